// THE SPINE: one sync, from the first rank's call to the acknowledgement. Read Run() first.
#pragma once

#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "daemon/sync/mailbox.h"
#include "daemon/sync/participants.h"

namespace weightd {

/// One sync of one model: Admit -> ResolveLayouts -> BuildPlan -> Prepare -> Transfer -> Verify ->
/// Commit -> Report. The commit unit is one replica: whatever fails for one replica leaves the
/// others alone; what fails for the trainer or the worker fails for all. Before Prepare nothing has
/// been written; after it a failed replica is POISONED if any of its bytes may have been written.
/// Thread safety: Run is called once, by one thread; events come through the mailbox, arrivals
/// through AddRequest.
class SyncSession {
 public:
  SyncSession(SessionHost& host, Mailbox& mailbox, uint64_t version)
      : host_(host), mailbox_(mailbox), version_(version) {}

  /// A rank's call of sync(). Returns false, and takes no notice, once Run has left Admit. Any
  /// thread.
  bool AddRequest(SyncRequest request);

  /// Runs the sync and answers every rank that has arrived. Blocks.
  SyncReport Run();

 private:
  /// One replica on its way.
  struct ReplicaRun {
    ReplicaView view;
    AttemptId attempt;
    std::shared_ptr<const ReplicaPlan> plan;
    Status error;           // why it will not commit
    bool prepared = false;  // Prepare was sent: an outcome is owed
    bool touched = false;   // its memory may have been written
    bool committed = false;
    bool already = false;        // held this version before: a retry leaves it alone
    bool running = false;        // a worker step is out
    std::set<MemberId> waiting;  // engine ranks whose answer is awaited
    std::map<uint32_t, TargetDigests> source_digests;
    std::map<uint32_t, TargetDigests> target_digests;
    uint64_t bytes_done = 0;
    std::vector<std::string> caches;
    bool viable() const { return error.ok(); }
  };

  // The steps. Each returns an error that ends the sync for all replicas.
  Status Admit();
  Status ResolveLayouts();
  Status BuildPlan();
  Status Prepare();
  Status Transfer();
  Status Verify();
  Status Commit();
  SyncReport Report(Status error);

  // Runs one step: progress to the actors, time, phase on errors.
  Status RunPhase(Phase phase, Status (SyncSession::*step)());

  // Waiting. Handle() turns an event into state; Wait() loops until `done` (true), an error that
  // ends the sync for all replicas, or `limit` without progress (false).
  template <typename Done>
  StatusOr<bool> Wait(milliseconds limit, Done&& done);
  Status Handle(const Event& event);
  Status OnStepDone(const Event& event);
  Status OnPlanLoaded(const Event& event);
  void OnEngineLost(const Event& event);
  Status DeadlineError(milliseconds limit, const std::string& peer) const;
  std::string WaitingFor() const;

  Status CheckRequests();
  Status CheckRanksPresent() const;
  Status NoEngineError() const;
  static Status NoWorkerError();
  Status AwaitMembers();
  Status CheckReplicas();
  Status LoadPlans();
  Status AwaitEngines(milliseconds limit);
  Status RunStep(Step step, milliseconds limit);
  Status CompareDigests(ReplicaRun& run);
  static uint64_t CombinedDigest(const ReplicaRun& run);
  Status CheckRequired() const;
  void Fail(ReplicaRun& run, Status error);
  void FailAll(const Status& error);
  void Fence();
  void TellEngines(const ReplicaRun& run, const ReplicaOutcome& outcome) const;
  void SendIdle(const ReplicaView& view, const Status& why) const;
  void SendProgress();
  std::vector<std::string> MissingMembers();
  Status ActorLost(MemberId member, const Status& cause) const;
  uint64_t TotalBytes() const;
  std::vector<ReplicaRun*> Viable();
  ReplicaRun* FindAttempt(AttemptId attempt);

  SessionHost& host_;
  Mailbox& mailbox_;
  const uint64_t version_;

  mutable std::mutex requests_mu_;
  std::vector<SyncRequest> requests_;  // guarded by requests_mu_ while admitting_
  bool admitting_ = true;              // guarded by requests_mu_

  Phase phase_ = Phase::kNone;
  Clock::time_point phase_start_;
  Clock::time_point last_progress_;
  std::vector<std::pair<Phase, uint64_t>> times_;
  GroupView group_;
  std::vector<ReplicaRun> replicas_;
  uint32_t require_ = 0;
  bool check_replicas_ = false;
  std::set<uint64_t> plans_waiting_;
  AttemptId check_attempt_;
  bool check_done_ = true;
  bool worker_lost_ = false;
  std::future<void> reservation_;
};

template <typename Done>
StatusOr<bool> SyncSession::Wait(milliseconds limit, Done&& done) {
  last_progress_ = Clock::now();
  while (!done()) {
    const std::optional<Event> event = mailbox_.Wait(last_progress_ + limit);
    if (!event.has_value()) return false;
    WEIGHTD_RETURN_IF_ERROR(Handle(*event));
  }
  return true;
}

}  // namespace weightd
