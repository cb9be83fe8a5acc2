// How a running sync waits, what it makes of events, and how it lets go of what failed.
#include <algorithm>

#include "daemon/base/failpoint.h"
#include "daemon/sync/sync_session.h"

namespace weightd {

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
      if (verified()) return absl::OkStatus();  // too late: verified replicas publish
      return Error(StatusCode::kCancelled, reason::kCancelled, "call sync() again when ready",
                   "sync was cancelled by the trainer");
    case Event::Kind::kConverted:
      if (event.stage != round_ + 1) return absl::OkStatus();
      [[fallthrough]];
    case Event::Kind::kQuiesced:
    case Event::Kind::kCommitted:
      if (run == nullptr || run->waiting.erase(event.member) == 0) return absl::OkStatus();
      if (run->held_since == Clock::time_point{}) run->held_since = Clock::now();
      run->caches.insert(run->caches.end(), event.caches.begin(), event.caches.end());
      if (!event.status.ok()) Fail(*run, event.status);
      return absl::OkStatus();
    case Event::Kind::kPlanLoaded:
      return OnPlanLoaded(event);
    case Event::Kind::kProgress:
      last_progress_ = heard_[event.device] = Clock::now();
      if (run == nullptr || !run->running.contains(event.device)) return absl::OkStatus();
      if ((event.step == Step::kVerify) != (phase_ == Phase::kVerify)) return absl::OkStatus();
      run->bytes_done[event.device] = event.bytes;
      SendProgress();
      return absl::OkStatus();
    case Event::Kind::kLanded:
      last_progress_ = heard_[event.device] = Clock::now();
      if (run != nullptr && run->viable() && event.round == round_) {
        OnLanded(*run, event.device, event.target, event.writes);
      }
      return absl::OkStatus();
    case Event::Kind::kStepDone:
      return OnStepDone(event);
    case Event::Kind::kWireId:
    case Event::Kind::kWireReady:
      OnWireEvent(event);
      return absl::OkStatus();
    case Event::Kind::kWorkerLost:
      for (ReplicaRun& replica : replicas_) {
        replica.running.erase(event.device);
        replica.following.erase(event.device);
        replica.joining.erase(event.device);
      }
      return LoseWorker(event.device, event.status);
    case Event::Kind::kShutdown:
      for (ReplicaRun& replica : replicas_) {
        replica.running.clear();
        replica.following.clear();
        replica.joining.clear();
      }
      plans_waiting_.clear();
      check_waiting_.clear();
      if (verified()) return absl::OkStatus();
      return event.status;
  }
  return absl::OkStatus();
}

Status SyncSession::ActorLost(MemberId member, const Status& cause) const {
  const bool ours = std::any_of(group_.ranks.begin(), group_.ranks.end(), [&](const auto& rank) {
    return rank != nullptr && rank->member == member;
  });
  if (!ours || verified()) return absl::OkStatus();
  return cause;
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
  std::set<std::string> busy = run.running;
  busy.insert(run.following.begin(), run.following.end());
  for (const std::string& device : busy) {
    if (const auto worker = host_.Worker(device)) worker->SendCancel(run.attempt);
  }
  LetGoOfWire(run);
}

void SyncSession::FailAll(const Status& error) {
  for (ReplicaRun& run : replicas_) {
    if (!run.committed) Fail(run, error);
  }
}

Status SyncSession::DeadlineError(milliseconds limit, const std::string& peer) {
  return WithPeer(
      Error(StatusCode::kDeadlineExceeded, reason::kDeadline,
            "look at the named peer: it is frozen, overloaded or unreachable; then sync again",
            "no answer from {} within {} s", peer, static_cast<double>(limit.count()) / 1000.0),
      peer);
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
    target.port->SendOutcome(run.attempt, outcome, !run.touched());
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
    progress.bytes_done += run.bytes_before;
    for (const auto& [device, bytes] : run.bytes_done) progress.bytes_done += bytes;
    if (progress.attempt == AttemptId{}) progress.attempt = run.attempt;
  }
  host_.ShowProgress(progress, WaitingFor());
  const std::lock_guard lock(requests_mu_);
  for (const SyncRequest& request : requests_) {
    request.port->SendProgress(request.request, progress);
  }
}

Status SyncSession::AwaitMembers() {
  std::vector<std::string> missing;
  WEIGHTD_ASSIGN_OR_RETURN(const bool all, Wait(host_.options().prepare, [&] {
                             missing = MissingMembers();
                             return missing.empty() || Viable().empty();
                           }));
  if (all) return CheckAnyViable();
  return DeadlineError(host_.options().prepare, fmt::format("{}", fmt::join(missing, ", ")));
}

// Trainer ranks lend their memory to the worker of their own device, engine ranks to every worker
// that stores into it or verifies it.
std::vector<std::string> SyncSession::MissingMembers() {
  std::set<std::string> missing;
  const auto require = [&](MemberId member, const std::string& device, const std::string& label) {
    if (!host_.Attached(member, device)) missing.insert(label);
  };
  for (const auto& rank : group_.ranks) require(rank->member, rank->device, rank->label);
  for (const ReplicaRun* run : Viable()) {
    for (const WorkerShare& share : run->plan->shares) {
      for (const std::vector<uint32_t>* targets : {&share.stores, &share.verifies}) {
        for (uint32_t target : *targets) {
          const EngineRank& rank = *run->view.targets[target].rank;
          require(rank.member, share.device, rank.label);
        }
      }
    }
  }
  return {missing.begin(), missing.end()};
}

Status SyncSession::AwaitEngines(milliseconds limit) {
  const bool rash = Mutated(publishing_ ? "early_ack" : "early_write");
  const auto settle = [this, rash] {
    bool waiting = false;
    for (ReplicaRun* run : Viable()) {
      if (!run->waiting.empty() && !rash) {
        waiting = true;
      } else if (publishing_ && !run->committed) {
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

}  // namespace weightd
