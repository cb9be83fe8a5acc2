// One trainer of two ranks, engines of one rank, a worker that answers at once: all in memory, so
// that a test decides what each of them does.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "daemon/sync/sync_session.h"

namespace weightd {

/// What an engine, the worker or the trainer does at one point; empty: what a healthy one does.
struct Script {
  std::function<void(MemberId, AttemptId)> on_prepare;
  std::function<void(MemberId, AttemptId)> on_commit;
  std::function<void(const StepCommand&)> on_step;
  std::function<void(const WorkerPlan&)> on_plan;
};

class FakeActor : public ActorPort {
 public:
  void SendProgress(uint64_t, const SyncProgress& progress) override {
    phases.push_back(progress.phase);
  }
  void SendReport(uint64_t, const SyncReport& sent) override { report = sent; }
  void SendWorkerChanged(const WorkerEndpoint&) override {}
  std::vector<Phase> phases;
  std::optional<SyncReport> report;
};

class SyncFixture : public SessionHost {
 public:
  /// `engines` replicas of one rank each.
  explicit SyncFixture(int engines = 1);

  /// Runs a sync of both ranks.
  SyncReport Sync(uint64_t version, uint32_t require = 0);

  Script script;
  Mailbox mailbox;
  std::vector<std::shared_ptr<FakeActor>> actors;
  std::vector<std::shared_ptr<Replica>> replicas;
  std::vector<MemberId> engine_members;
  std::vector<std::string> outcomes;  ///< "engine e0: committed", "... untouched", "... POISONED"
  std::vector<std::string> worker_log;
  bool worker_alive = true;
  bool worker_killed = false;
  SyncOptions sync_options;
  VersionLedger ledger;
  GroupView group;

  void StepDone(const StepCommand& command, uint64_t word, const Status& status = {});
  void Lose(MemberId member, bool engine);

  GroupView ViewGroup() override { return group; }
  std::vector<ReplicaView> ViewReplicas() override;
  AttemptId NextAttempt() override { return {1, next_attempt_++}; }
  std::shared_ptr<WorkerPort> Worker() override;
  Status AdmitVersion(uint64_t version) override { return ledger.Admit(version, true); }
  Status CheckRetry(uint64_t version, const std::string& layout, uint64_t digest) override {
    return ledger.CheckRetry(version, layout, digest);
  }
  void ApplyReplica(const ReplicaView& view, ReplicaEvent event, const Status&) override {
    (void)view.handle->Apply(event);
  }
  void CommitReplica(const ReplicaView& view, uint64_t version, const std::string& layout,
                     uint64_t digest) override;
  void CommitCatchUp(const ReplicaView&, uint64_t) override {}
  ReplicaState StateOf(const ReplicaView& view) override { return view.handle->state; }
  Status ResolveLayouts(const GroupView&, const ReplicaView&) override { return resolve_error; }
  StatusOr<std::shared_ptr<const ReplicaPlan>> PlanFor(const GroupView&,
                                                       const ReplicaView&) override;
  bool Attached(MemberId) override { return true; }
  bool PlanLoaded(uint64_t) override { return plan_loaded_; }
  void MarkPlanLoaded(uint64_t) override { plan_loaded_ = true; }
  void ReserveVersion(uint64_t) override {}
  void ShowProgress(const SyncProgress&, const std::string&) override {}
  const SyncOptions& options() const override { return sync_options; }

  Status resolve_error;

 private:
  uint64_t next_attempt_ = 1;
  bool plan_loaded_ = false;
  std::shared_ptr<const ReplicaPlan> plan_;
  std::shared_ptr<WorkerPort> worker_;
};

}  // namespace weightd
