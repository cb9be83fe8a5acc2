// THE SPINE: one sync, from the first rank's call to the acknowledgement. Read Run() first.
#pragma once

#include <future>
#include <initializer_list>
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
/// Commit -> Report. Replicas that receive derived parameters in several stages take one round of
/// Transfer and Verify per stage, and convert between rounds. The commit unit is one replica:
/// whatever fails for one replica leaves the others alone; what fails for the trainer fails for
/// all. A worker that fails does so for the replicas in whose plan its device takes part: all, if
/// trainer ranks have their memory there. Before Prepare nothing has been written; after it a
/// failed replica is POISONED if any of its bytes may have been written. Thread safety: Run is
/// called once, by one thread; events come through the mailbox, arrivals through AddRequest.
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
    bool committed = false;
    bool already = false;             // held this version before: a retry leaves it alone
    std::set<std::string> running;    // devices whose workers have a step of it
    std::set<std::string> following;  // devices whose workers verify beside the transfer
    std::set<std::string> followed;   // devices that need no other verification in this round
    // By target: what each device that stores into it has done with, and the least that the device
    // that verifies it has been told.
    std::map<uint32_t, std::map<std::string, uint32_t>> landed;
    std::map<uint32_t, uint32_t> landed_told;
    std::set<std::string> writers;  // devices whose workers may have written in this round
    bool written = false;           // some may have, in a round before
    uint64_t wire = 0;              // between its workers; 0: none
    bool opening = false;           // the wire is not known to be open yet
    std::string wire_id;
    std::set<std::string> joining;  // devices whose workers owe an answer about the wire
    std::set<MemberId> waiting;     // engine ranks whose answer is awaited
    // By target: sums over all workers, of this round; and of all rounds, once they were equal.
    std::map<uint32_t, TargetDigests> source_digests;
    std::map<uint32_t, TargetDigests> target_digests;
    std::map<uint32_t, TargetDigests> digests;
    std::map<std::string, uint64_t> bytes_done;  // by device, of the running step
    uint64_t bytes_verified = 0;
    uint64_t bytes_before = 0;  // of rounds that are over
    std::vector<std::string> caches;
    Clock::time_point held_since;  // when its first rank held still; unset until then
    bool viable() const { return error.ok(); }
    bool touched() const { return written || !writers.empty(); }
  };

  // The steps. Each returns an error that ends the sync for all replicas.
  Status Admit();
  Status ResolveLayouts();
  Status BuildPlan();
  Status Prepare();
  Status Transfer();
  Status Verify();
  Status Convert();
  Status Commit();
  SyncReport Report(const Status& error);

  // Runs steps in order, up to an error: progress to the actors, time, phase on errors.
  using PhaseStep = std::pair<Phase, Status (SyncSession::*)()>;
  Status RunPhases(std::initializer_list<PhaseStep> steps);
  uint32_t NumRounds();

  // Waiting. Handle() turns an event into state; Wait() loops until `done` (true), an error that
  // ends the sync for all replicas, or `limit` without progress (false).
  template <typename Done>
  StatusOr<bool> Wait(milliseconds limit, Done&& done);
  Status Handle(const Event& event);
  void OnEngineLost(const Event& event);
  static Status DeadlineError(milliseconds limit, const std::string& peer);
  std::string WaitingFor() const;

  // Workers: what is asked of them, what they answer, and what follows when one does not.
  Status LoadPlans();
  Status OpenWires();
  Status CheckWire(const ReplicaRun& run) const;
  void OfferWire(ReplicaRun& run);
  void OnWireEvent(const Event& event);
  void LetGoOfWire(ReplicaRun& run);
  Status RunStep(Step step, milliseconds limit);
  StepCommand CommandOf(const ReplicaRun& run, const WorkerShare& share, Step step) const;
  void SendSteps(ReplicaRun& run, Step step, milliseconds limit);
  bool VerifiesBeside(const ReplicaRun& run, const std::string& device) const;
  void StartFollowing(ReplicaRun& run);
  void OnLanded(ReplicaRun& run, const std::string& device, uint32_t target, uint32_t writes);
  void OnAllLanded(ReplicaRun& run, const std::string& device);
  Status CheckReplicas();
  Status AwaitWorkers(milliseconds limit);
  std::set<std::string> OwingWorkers() const;
  Status OnPlanLoaded(const Event& event);
  Status OnStepDone(const Event& event);
  Status LoseWorker(const std::string& device, const Status& error);
  static Status NoWorkerError(const std::string& device);
  static Status AddDigests(const TargetDigests& part, std::map<uint32_t, TargetDigests>& sums);
  Status CompareShardWords() const;
  void Fence();

  Status CheckRequests();
  Status CheckRanksPresent() const;
  Status NoEngineError() const;
  Status AwaitMembers();
  Status AwaitEngines(milliseconds limit);
  Status CompareDigests(ReplicaRun& run);
  static void AddRound(const TargetDigests& round, TargetDigests& sum);
  static uint64_t CombinedDigest(const ReplicaRun& run);
  Status CheckRequired() const;
  Status CheckAnyViable();
  void Fail(ReplicaRun& run, Status error);
  void FailAll(const Status& error);
  void TellEngines(const ReplicaRun& run, const ReplicaOutcome& outcome) const;
  void SendIdle(const ReplicaView& view, const Status& why) const;
  void SendProgress();
  std::vector<std::string> MissingMembers();
  Status ActorLost(MemberId member, const Status& cause) const;
  uint64_t TotalBytes() const;
  bool verified() const { return publishing_ || phase_ > Phase::kCommit; }
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
  PhaseTimes times_;
  uint32_t round_ = 0;
  bool publishing_ = false;  // everything is verified
  GroupView group_;
  std::vector<ReplicaRun> replicas_;
  uint32_t require_ = 0;
  bool check_replicas_ = false;
  std::set<std::pair<uint64_t, std::string>> plans_waiting_;  // (plan, device) to be confirmed
  AttemptId check_attempt_;
  std::set<std::string> check_waiting_;                       // devices that compare shards
  std::map<std::string, std::vector<uint64_t>> shard_words_;  // by device
  std::map<std::string, Clock::time_point> heard_;            // by device: its last sign of life
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
