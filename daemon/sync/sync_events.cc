// How a running sync waits, what it makes of events, and how it lets go of what failed.
#include <algorithm>

#include "daemon/base/failpoint.h"
#include "daemon/sync/sync_session.h"

namespace weightd {
namespace {

constexpr milliseconds kFenceLimit{3000};

}  // namespace

bool SyncSession::AddRequest(SyncRequest request) {
  const MemberId member = request.member;
  {
    const std::lock_guard lock(requests_mu_);
    if (!admitting_) return false;
    std::erase_if(requests_, [&](const SyncRequest& old) { return old.rank == request.rank; });
    requests_.push_back(std::move(request));
  }
  mailbox_.Post({.kind = Event::Kind::kActorArrived, .member = member});
  return true;
}

Status SyncSession::Handle(const Event& event) {
  ReplicaRun* run = FindAttempt(event.attempt);
  switch (event.kind) {
    case Event::Kind::kActorArrived:
    case Event::Kind::kAttached:
      return absl::OkStatus();
    case Event::Kind::kActorLost:
      return ActorLost(event.member, event.status);
    case Event::Kind::kEngineLost:
      OnEngineLost(event);
      return absl::OkStatus();
    case Event::Kind::kCancelled:
      if (phase_ >= Phase::kCommit) return absl::OkStatus();  // too late: verified replicas publish
      return Error(StatusCode::kCancelled, reason::kCancelled, "call sync() again when ready",
                   "sync was cancelled by the trainer");
    case Event::Kind::kQuiesced:
    case Event::Kind::kCommitted:
      if (run == nullptr || run->waiting.erase(event.member) == 0) return absl::OkStatus();
      run->caches.insert(run->caches.end(), event.caches.begin(), event.caches.end());
      if (!event.status.ok()) Fail(*run, event.status);
      return absl::OkStatus();
    case Event::Kind::kPlanLoaded:
      return OnPlanLoaded(event);
    case Event::Kind::kProgress:
      last_progress_ = Clock::now();
      if (run != nullptr) run->bytes_done = event.bytes;
      SendProgress();
      return absl::OkStatus();
    case Event::Kind::kStepDone:
      return OnStepDone(event);
    case Event::Kind::kWorkerLost:
      worker_lost_ = true;
      for (ReplicaRun& replica : replicas_) replica.running = false;
      check_done_ = true;
      if (phase_ >= Phase::kCommit) return absl::OkStatus();  // bytes are verified already
      return event.status;
  }
  return absl::OkStatus();
}

Status SyncSession::ActorLost(MemberId member, const Status& cause) const {
  const bool ours = std::any_of(group_.ranks.begin(), group_.ranks.end(), [&](const auto& rank) {
    return rank != nullptr && rank->member == member;
  });
  if (!ours || phase_ >= Phase::kCommit) return absl::OkStatus();
  return cause;
}

Status SyncSession::OnPlanLoaded(const Event& event) {
  plans_waiting_.erase(event.plan);
  for (ReplicaRun* run : Viable()) {
    if (run->plan == nullptr || run->plan->worker->handle != event.plan) continue;
    if (!event.status.ok()) {
      Fail(*run, WithPeer(event.status, "worker"));
    } else if (event.digest != run->plan->worker->digest) {
      Fail(*run,
           WithPeer(Error(StatusCode::kInternal, reason::kPlanMismatch,
                          "run daemon and workers of one release; report this if they are",
                          "daemon and worker computed different plans: {}", run->view.label()),
                    "worker"));
    } else {
      host_.MarkPlanLoaded(event.plan);
    }
  }
  return absl::OkStatus();
}

Status SyncSession::OnStepDone(const Event& event) {
  if (event.step == Step::kCheckReplicas && event.attempt == check_attempt_) {
    check_done_ = true;
    return event.status;
  }
  ReplicaRun* run = FindAttempt(event.attempt);
  if (run == nullptr) return absl::OkStatus();
  run->running = false;
  if (event.step == Step::kTransfer) run->touched = event.touched;
  if (!event.status.ok()) {
    Fail(*run, event.status);
    return absl::OkStatus();
  }
  auto& digests = event.step == Step::kTransfer ? run->source_digests : run->target_digests;
  for (const TargetDigests& target : event.digests) digests[target.target] = target;
  return absl::OkStatus();
}

void SyncSession::OnEngineLost(const Event& event) {
  for (ReplicaRun& run : replicas_) {
    const auto lost =
        std::find_if(run.view.targets.begin(), run.view.targets.end(),
                     [&](const TargetView& target) { return target.rank->member == event.member; });
    if (lost == run.view.targets.end() || run.committed) continue;
    Fail(run, event.status);
  }
}

void SyncSession::Fail(ReplicaRun& run, Status error) {
  if (!run.viable()) return;
  run.error = WithPhase(std::move(error), Name(phase_));
  run.waiting.clear();
  if (!run.running) return;
  if (auto worker = host_.Worker()) worker->SendCancel(run.attempt);
}

void SyncSession::FailAll(const Status& error) {
  for (ReplicaRun& run : replicas_) {
    if (!run.committed) Fail(run, error);
  }
}

// Waits until the worker has answered every step that is out. After this nobody writes for these
// attempts: either the worker said so, or it is dead.
void SyncSession::Fence() {
  const auto running = [this] {
    return std::any_of(replicas_.begin(), replicas_.end(),
                       [](const ReplicaRun& run) { return run.running; });
  };
  const auto deadline = Clock::now() + kFenceLimit;
  bool killed = false;
  while (running()) {
    const std::optional<Event> event =
        mailbox_.Wait(killed ? Clock::now() + kFenceLimit : deadline);
    if (event.has_value()) {
      (void)Handle(*event);
      continue;
    }
    const auto worker = host_.Worker();
    if (killed || worker == nullptr)
      break;  // nothing is left to kill: its loss was reported before
    worker->Kill("did not stop writing a cancelled attempt");
    killed = true;
  }
}

Status SyncSession::DeadlineError(milliseconds limit, const std::string& peer) const {
  return WithPeer(
      Error(StatusCode::kDeadlineExceeded, reason::kDeadline,
            "look at the named peer: it is frozen, overloaded or unreachable; then sync again",
            "no answer from {} within {} s", peer.empty() ? "the worker" : peer,
            static_cast<double>(limit.count()) / 1000.0),
      peer.empty() ? "worker" : peer);
}

Status SyncSession::NoWorkerError() {
  return WithPeer(Error(StatusCode::kUnavailable, reason::kWorkerLost,
                        "it is being restarted: sync again; see the daemon's log if it stays away",
                        "worker is not running: device=host"),
                  "worker host");
}

std::vector<SyncSession::ReplicaRun*> SyncSession::Viable() {
  std::vector<ReplicaRun*> viable;
  for (ReplicaRun& run : replicas_) {
    if (run.viable() && !run.already) viable.push_back(&run);
  }
  return viable;
}

void SyncSession::TellEngines(const ReplicaRun& run, const ReplicaOutcome& outcome) const {
  if (!run.prepared) return SendIdle(run.view, run.error);
  for (const TargetView& target : run.view.targets) {
    target.port->SendOutcome(run.attempt, outcome, !run.touched);
  }
}

void SyncSession::SendIdle(const ReplicaView& view, const Status& why) const {
  for (const TargetView& target : view.targets) target.port->SendIdle(version_, why);
}

SyncSession::ReplicaRun* SyncSession::FindAttempt(AttemptId attempt) {
  if (attempt == AttemptId{}) return nullptr;
  for (ReplicaRun& run : replicas_) {
    if (run.attempt == attempt) return &run;
  }
  return nullptr;
}

uint64_t SyncSession::TotalBytes() const {
  uint64_t bytes = 0;
  for (const ReplicaRun& run : replicas_) {
    if (run.plan != nullptr && run.viable()) bytes += run.plan->compiled->bytes;
  }
  return bytes;
}

void SyncSession::SendProgress() {
  SyncProgress progress;
  progress.phase = phase_;
  progress.bytes_total = TotalBytes();
  for (const ReplicaRun& run : replicas_) {
    progress.bytes_done += run.bytes_done;
    if (progress.attempt == AttemptId{}) progress.attempt = run.attempt;
  }
  host_.ShowProgress(progress, WaitingFor());
  const std::lock_guard lock(requests_mu_);
  for (const SyncRequest& request : requests_) {
    request.port->SendProgress(request.request, progress);
  }
}

// The waits of the single steps.

Status SyncSession::AwaitMembers() {
  std::vector<std::string> missing;
  WEIGHTD_ASSIGN_OR_RETURN(const bool all, Wait(host_.options().prepare, [&] {
                             missing = MissingMembers();
                             return missing.empty();
                           }));
  if (all) return absl::OkStatus();
  return DeadlineError(host_.options().prepare, fmt::format("{}", fmt::join(missing, ", ")));
}

std::vector<std::string> SyncSession::MissingMembers() {
  std::vector<std::string> missing;
  for (const auto& rank : group_.ranks) {
    if (!host_.Attached(rank->member)) missing.push_back(rank->label);
  }
  for (const ReplicaRun* run : Viable()) {
    for (const TargetView& target : run->view.targets) {
      if (!host_.Attached(target.rank->member)) missing.push_back(target.rank->label);
    }
  }
  return missing;
}

Status SyncSession::AwaitEngines(milliseconds limit) {
  const auto settle = [this] {
    bool waiting = false;
    for (ReplicaRun* run : Viable()) {
      if (!run->waiting.empty()) {
        waiting = true;
      } else if (phase_ == Phase::kCommit && !run->committed) {
        run->committed = true;
        host_.CommitReplica(run->view, version_, run->plan->resolved->layout_key,
                            CombinedDigest(*run));
      }
    }
    return !waiting;
  };
  WEIGHTD_ASSIGN_OR_RETURN(const bool all, Wait(limit, settle));
  if (all) return absl::OkStatus();
  for (ReplicaRun* run : Viable()) {
    for (const TargetView& target : run->view.targets) {
      if (!run->waiting.contains(target.rank->member)) continue;
      Fail(*run, WithRank(DeadlineError(limit, target.rank->label), target.rank->label));
      break;
    }
  }
  return absl::OkStatus();
}

Status SyncSession::LoadPlans() {
  const std::shared_ptr<WorkerPort> worker = host_.Worker();
  if (worker == nullptr) return NoWorkerError();
  for (ReplicaRun* run : Viable()) {
    const uint64_t handle = run->plan->worker->handle;
    if (host_.PlanLoaded(handle) || !plans_waiting_.insert(handle).second) continue;
    worker->SendPlan(*run->plan->worker);
  }
  WEIGHTD_ASSIGN_OR_RETURN(
      const bool all, Wait(host_.options().prepare, [this] { return plans_waiting_.empty(); }));
  return all ? absl::OkStatus() : DeadlineError(host_.options().prepare, "worker");
}

Status SyncSession::RunStep(Step step, milliseconds limit) {
  const std::shared_ptr<WorkerPort> worker = host_.Worker();
  if (worker == nullptr) return NoWorkerError();
  for (ReplicaRun* run : Viable()) {
    StepCommand command;
    command.attempt = run->attempt;
    command.step = step;
    command.plan = run->plan->worker->handle;
    for (uint32_t i = 0; i < run->view.targets.size(); ++i) command.targets.push_back(i);
    command.version = version_;
    run->running = true;
    run->touched = true;
    worker->SendStep(command);
  }
  WEIGHTD_ASSIGN_OR_RETURN(const bool all, Wait(limit, [this] {
                             return std::none_of(replicas_.begin(), replicas_.end(),
                                                 [](const ReplicaRun& run) { return run.running; });
                           }));
  return all ? absl::OkStatus() : DeadlineError(limit, "worker");
}

Status SyncSession::CheckReplicas() {
  const std::shared_ptr<WorkerPort> worker = host_.Worker();
  if (worker == nullptr || Viable().empty()) return absl::OkStatus();
  StepCommand command;
  command.attempt = check_attempt_ = host_.NextAttempt();
  command.step = Step::kCheckReplicas;
  command.plan = Viable().front()->plan->worker->handle;
  check_done_ = false;
  worker->SendStep(command);
  WEIGHTD_ASSIGN_OR_RETURN(const bool done,
                           Wait(host_.options().verify, [this] { return check_done_; }));
  return done ? absl::OkStatus() : DeadlineError(host_.options().verify, "worker");
}

}  // namespace weightd
