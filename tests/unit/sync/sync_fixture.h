// One trainer of two ranks, engines of one rank, workers that answer at once: all in memory, so
// that a test decides what each of them does.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "daemon/sync/sync_session.h"

namespace weightd {

/// What an engine, the worker or the trainer does at one point; empty: what a healthy one does.
struct Script {
  std::function<void(MemberId, AttemptId)> on_prepare;
  std::function<void(MemberId, AttemptId, uint32_t stage)> on_convert;
  std::function<void(MemberId, AttemptId)> on_commit;
  std::function<void(const std::string& device, const StepCommand&)> on_step;
  std::function<void(const std::string& device)> on_cancel;
  std::function<void(const std::string& device, const LandedMark&)> on_landed;
  std::function<Digest128(const std::string& device, Digest128)> on_plan;
  std::function<void(const std::string& device, const WireOffer&)> on_open_wire;
};

/// Where the memory is, and what the trainer's ranks hold.
struct Scene {
  int engines = 1;  ///< replicas of one rank each
  std::vector<std::string> actor_devices = {"host", "host"};
  std::vector<std::string> engine_devices = {};  ///< the last one is that of all further engines
  std::vector<uint32_t> stages = {};  ///< per engine; the last one is that of all further engines
  int64_t elements = 4;               ///< float32, of the only tensor
  bool replicated = false;            ///< both ranks hold all of the tensor, not half of it each
  bool wire = false;                  ///< between different devices bytes go over a wire
};

class FakeActor : public ActorPort {
 public:
  void SendProgress(uint64_t, const SyncProgress& progress) override {
    phases.push_back(progress.phase);
    bytes_done.push_back(progress.bytes_done);
  }
  void SendReport(uint64_t, const SyncReport& sent) override { report = sent; }
  void SendWorkerChanged(const WorkerEndpoint&) override {}
  void SendStartWorker(const WorkerOrder&) override {}
  void SendStopWorker(const std::string&, bool, const std::string&) override {}
  std::vector<Phase> phases;
  std::vector<uint64_t> bytes_done;
  std::optional<SyncReport> report;
};

class SyncFixture : public SessionHost {
 public:
  explicit SyncFixture(const Scene& scene = {});

  /// Runs a sync of both ranks.
  SyncReport Sync(uint64_t version, uint32_t require = 0, bool check_replicas = false);

  Script script;
  Mailbox mailbox;
  std::vector<std::shared_ptr<FakeActor>> actors;
  std::vector<std::shared_ptr<Replica>> replicas;
  std::vector<MemberId> engine_members;
  std::vector<std::string> outcomes;  ///< "engine e0: committed", "... untouched", "... POISONED"
  std::vector<std::string> idle;      ///< "engine e0: 1 ok": version and reason of SendIdle
  /// "transfer", in a later round "transfer+1", with a device "transfer host.1"; and "engine e0
  /// converts 1".
  std::vector<std::string> worker_log;
  std::set<std::string> workers_down;        ///< devices
  std::set<std::string> workers_killed;      ///< devices
  std::map<std::string, WorkerFacts> facts;  ///< by device
  std::map<uint64_t, uint64_t> wires;        ///< that are kept, by plan
  std::vector<uint64_t> wires_used;          ///< by each transfer
  /// Is the member's memory mapped there? Empty: always.
  std::function<bool(MemberId, const std::string& device)> attached;
  SyncOptions sync_options;
  VersionLedger ledger;
  GroupView group;

  void StepDone(const std::string& device, const StepCommand& command, uint64_t word,
                const Status& status = {});
  /// What a healthy worker answers: the words of all writers add up to that of the verification.
  void StepDone(const std::string& device, const StepCommand& command);
  void LoseWorker(const std::string& device);
  void Landed(const std::string& device, const StepCommand& command, uint32_t writes);
  /// A worker's answer to an offer.
  void WireReady(const std::string& device, uint64_t wire, const Status& status = {});
  void Lose(MemberId member, bool engine);

  GroupView ViewGroup() override { return group; }
  std::vector<ReplicaView> ViewReplicas() override;
  AttemptId NextAttempt() override { return {1, next_attempt_++}; }
  std::shared_ptr<WorkerPort> Worker(const std::string& device) override;
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
  bool Attached(MemberId member, const std::string& device) override {
    return !attached || attached(member, device);
  }
  bool PlanLoaded(uint64_t handle, const std::string& device) override {
    return loaded_.contains({handle, device});
  }
  void MarkPlanLoaded(uint64_t handle, const std::string& device) override {
    loaded_.emplace(handle, device);
  }
  uint64_t FindWire(uint64_t plan) override { return wires.contains(plan) ? wires[plan] : 0; }
  uint64_t NextWire() override { return next_wire_++; }
  void KeepWire(uint64_t plan, uint64_t wire, const std::vector<std::string>&) override {
    wires[plan] = wire;
  }
  void DropWire(uint64_t plan) override { wires.erase(plan); }
  std::mutex& issue_mutex() override { return issue_mutex_; }
  void ReserveVersion(uint64_t) override {}
  void ShowProgress(const SyncProgress&, const std::string&) override {}
  const SyncOptions& options() const override { return sync_options; }

  Status resolve_error;

 private:
  const std::string& EngineDevice(size_t engine) const;
  uint32_t NumStages(size_t engine) const;

  const Scene scene_;
  uint64_t next_attempt_ = 1;
  uint64_t next_wire_ = 1;
  std::mutex issue_mutex_;
  std::set<std::pair<uint64_t, std::string>> loaded_;
  std::map<std::string, std::shared_ptr<const ReplicaPlan>> plans_;  // by engine
  std::map<std::string, std::shared_ptr<WorkerPort>> workers_;       // by device
};

}  // namespace weightd
