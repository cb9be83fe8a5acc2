#include "daemon/sync/sync_session.h"

#include <algorithm>

#include "daemon/base/failpoint.h"

namespace weightd {

SyncReport SyncSession::Run() {
  Status status = RunPhases({{Phase::kAdmit, &SyncSession::Admit},
                             {Phase::kResolveLayouts, &SyncSession::ResolveLayouts},
                             {Phase::kBuildPlan, &SyncSession::BuildPlan},
                             {Phase::kPrepare, &SyncSession::Prepare},
                             {Phase::kTransfer, &SyncSession::Transfer},
                             {Phase::kVerify, &SyncSession::Verify}});
  while (status.ok() && round_ + 1 < NumRounds()) {
    status = RunPhases({{Phase::kCommit, &SyncSession::Convert},
                        {Phase::kTransfer, &SyncSession::Transfer},
                        {Phase::kVerify, &SyncSession::Verify}});
  }
  if (status.ok()) status = RunPhases({{Phase::kCommit, &SyncSession::Commit}});
  return Report(status);
}

Status SyncSession::RunPhases(std::initializer_list<PhaseStep> steps) {
  for (const auto& [phase, step] : steps) {
    phase_ = phase;
    phase_start_ = Clock::now();
    Status status = (this->*step)();
    AddTime(times_, phase, MicrosSince(phase_start_));
    if (!status.ok()) return WithPhase(std::move(status), Name(phase));
  }
  return absl::OkStatus();
}

uint32_t SyncSession::NumRounds() {
  uint32_t rounds = 1;
  for (const ReplicaRun* run : Viable()) rounds = std::max(rounds, run->view.num_rounds());
  return rounds;
}

// Admit: every rank of the group has called sync() with the same version, and the version may come
// next.
Status SyncSession::Admit() {
  Status missing;
  WEIGHTD_ASSIGN_OR_RETURN(const bool all, Wait(host_.options().admit, [&] {
                             group_ = host_.ViewGroup();
                             missing = CheckRanksPresent();
                             if (!missing.ok()) return true;
                             const std::lock_guard lock(requests_mu_);
                             return requests_.size() == static_cast<size_t>(group_.world_size);
                           }));
  {
    const std::lock_guard lock(requests_mu_);
    admitting_ = false;
  }
  WEIGHTD_RETURN_IF_ERROR(missing);
  if (!all) return DeadlineError(host_.options().admit, WaitingFor());
  WEIGHTD_RETURN_IF_ERROR(CheckRequests());
  return host_.AdmitVersion(version_);
}

// ResolveLayouts: every replica's loader is found and evaluated.
Status SyncSession::ResolveLayouts() {
  for (ReplicaView& view : host_.ViewReplicas()) {
    ReplicaRun run;
    run.already = run.committed = view.state == ReplicaState::kServing && view.version == version_;
    run.view = std::move(view);
    replicas_.push_back(std::move(run));
  }
  if (replicas_.empty()) return NoEngineError();
  for (ReplicaRun* run : Viable()) {
    if (Status status = host_.ResolveLayouts(group_, run->view); !status.ok()) {
      Fail(*run, WithRank(std::move(status), run->view.label()));
    }
  }
  return CheckRequired();
}

// BuildPlan: the plan is proved, every worker has the same one, and wires between them are open.
Status SyncSession::BuildPlan() {
  for (ReplicaRun* run : Viable()) {
    StatusOr<std::shared_ptr<const ReplicaPlan>> plan = host_.PlanFor(group_, run->view);
    if (plan.ok()) {
      run->plan = *std::move(plan);
    } else {
      Fail(*run, WithRank(plan.status(), run->view.label()));
    }
  }
  WEIGHTD_RETURN_IF_ERROR(CheckRequired());
  WEIGHTD_RETURN_IF_ERROR(LoadPlans());
  WEIGHTD_RETURN_IF_ERROR(OpenWires());
  return CheckRequired();
}

// Prepare: every engine rank has marked itself dirty and stopped reading its parameters.
Status SyncSession::Prepare() {
  WEIGHTD_RETURN_IF_ERROR(AwaitMembers());
  if (check_replicas_) WEIGHTD_RETURN_IF_ERROR(CheckReplicas());
  SendProgress();
  reservation_ = std::async(std::launch::async, [this] { host_.ReserveVersion(version_); });
  for (ReplicaRun* run : Viable()) {
    run->attempt = host_.NextAttempt();
    run->prepared = true;
    host_.ApplyReplica(run->view, ReplicaEvent::kPrepare, absl::OkStatus());
    for (const TargetView& target : run->view.targets) {
      run->waiting.insert(target.rank->member);
      target.port->SendPrepare(run->attempt, version_, false);
    }
  }
  WEIGHTD_RETURN_IF_ERROR(AwaitEngines(host_.options().prepare));
  Failpoint("prepared");
  return CheckRequired();
}

// Transfer: each worker writes, or sends, what its device's trainer ranks supply, window by window.
// Workers that can verify what has landed meanwhile.
Status SyncSession::Transfer() {
  for (ReplicaRun* run : Viable()) {
    run->written = run->touched();
    run->writers.clear();
    run->bytes_before = run->bytes_verified;
    run->source_digests.clear();
    run->target_digests.clear();
    run->followed.clear();
    run->landed.clear();
    run->landed_told.clear();
  }
  SendProgress();
  return RunStep(Step::kTransfer, host_.options().transfer);
}

// Verify: what landed has the digest of what was sent.
Status SyncSession::Verify() {
  Failpoint("before_verify");
  SendProgress();
  WEIGHTD_RETURN_IF_ERROR(RunStep(Step::kVerify, host_.options().verify));
  for (ReplicaRun* run : Viable()) {
    if (Status status = CompareDigests(*run); !status.ok()) Fail(*run, std::move(status));
  }
  return absl::OkStatus();
}

// Convert: the ranks with a stage to come convert the one that was verified, whose memory it takes.
// Opens the next round.
Status SyncSession::Convert() {
  SendProgress();
  for (ReplicaRun* run : Viable()) {
    for (const TargetView& target : run->view.targets) {
      if (round_ + 1 >= target.num_rounds() || Mutated("skip_convert")) continue;
      run->waiting.insert(target.rank->member);
      target.port->SendConvert(run->attempt, round_ + 1);
    }
  }
  WEIGHTD_RETURN_IF_ERROR(AwaitEngines(host_.options().commit));
  ++round_;
  Failpoint("between_rounds");
  return CheckAnyViable();
}

// Commit: verified replicas publish the version; each by itself.
Status SyncSession::Commit() {
  reservation_.get();
  publishing_ = true;
  Failpoint("before_publish");
  SendProgress();
  for (ReplicaRun* run : Viable()) {
    host_.ApplyReplica(run->view, ReplicaEvent::kVerified, absl::OkStatus());
    for (const TargetView& target : run->view.targets) {
      run->waiting.insert(target.rank->member);
      target.port->SendCommit(run->attempt, version_);
    }
  }
  return AwaitEngines(host_.options().commit);
}

// Report: nobody writes any more; engines and actors learn the outcome.
SyncReport SyncSession::Report(const Status& error) {
  phase_ = Phase::kReport;
  phase_start_ = Clock::now();
  Failpoint("before_ack");
  if (reservation_.valid()) reservation_.get();
  if (!error.ok()) FailAll(error);
  Fence();
  if (replicas_.empty()) {  // it ended before it looked at them
    for (const ReplicaView& view : host_.ViewReplicas()) SendIdle(view, error);
  }
  SyncReport report;
  report.version = version_;
  report.error = error;
  size_t committed = 0;
  for (ReplicaRun& run : replicas_) {
    if (run.prepared && !run.committed) {
      host_.ApplyReplica(
          run.view, run.touched() ? ReplicaEvent::kFailedTouched : ReplicaEvent::kFailedUntouched,
          run.error);
    }
    ReplicaOutcome outcome;
    outcome.engine = run.view.engine;
    outcome.dp_rank = run.view.dp_rank;
    outcome.committed = run.committed;
    outcome.state = host_.StateOf(run.view);
    outcome.version = run.committed ? version_ : run.touched() ? 0 : run.view.version;
    outcome.error = run.error;
    outcome.verified = run.committed ? run.view.verified() : "";
    outcome.caches_reset = run.caches;
    TellEngines(run, outcome);
    if (run.held_since != Clock::time_point{}) {
      report.pause_us = std::max(report.pause_us, MicrosSince(run.held_since));
    }
    if (run.committed) {
      ++committed;
      if (!run.already) {
        report.bytes += run.plan->compiled->bytes;
        for (const auto& [path, bytes] : run.plan->path_bytes) report.path_bytes[path] += bytes;
      }
    }
    if (report.attempt == AttemptId{}) report.attempt = run.attempt;
    report.replicas.push_back(std::move(outcome));
  }
  const size_t needed = require_ == 0 ? replicas_.size() : require_;
  if (report.error.ok() && committed < needed) {
    const auto failed = std::find_if(replicas_.begin(), replicas_.end(),
                                     [](const ReplicaRun& run) { return !run.committed; });
    report.error = failed->error;
  }
  AddTime(times_, phase_, MicrosSince(phase_start_));
  report.phases = times_;
  const std::lock_guard lock(requests_mu_);
  for (const SyncRequest& request : requests_) request.port->SendReport(request.request, report);
  return report;
}

}  // namespace weightd
