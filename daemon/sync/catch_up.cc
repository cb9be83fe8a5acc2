#include "daemon/sync/catch_up.h"

#include <algorithm>

#include "daemon/sync/plan_cache.h"

namespace weightd {

Status CatchUpSession::Run() {
  attempt_ = host_.NextAttempt();
  Status status = Prepare();
  if (status.ok()) status = Copy(source_.peers.empty() ? Step::kRestore : Step::kCopyPeer);
  if (status.ok()) status = Commit();
  Finish(status);
  return status;
}

Status CatchUpSession::Retain() {
  attempt_ = host_.NextAttempt();
  const Status status = Copy(Step::kRetain);
  Finish(status);
  return status;
}

template <typename Done>
Status CatchUpSession::Wait(milliseconds limit, const char* what, Done&& done) {
  auto progress = Clock::now();
  while (!done()) {
    const std::optional<Event> event = mailbox_.Wait(progress + limit);
    if (!event.has_value()) {
      return WithPeer(Error(StatusCode::kDeadlineExceeded, reason::kDeadline,
                            "look at the engine and at the daemon's log",
                            "catch-up got no answer from {} within {} ms: {}", what, limit.count(),
                            view_.label()),
                      what);
    }
    if (event->kind == Event::Kind::kProgress) progress = Clock::now();
    WEIGHTD_RETURN_IF_ERROR(Handle(*event));
  }
  return absl::OkStatus();
}

Status CatchUpSession::Handle(const Event& event) {
  switch (event.kind) {
    case Event::Kind::kEngineLost: {
      const bool ours = std::any_of(
          view_.targets.begin(), view_.targets.end(),
          [&](const TargetView& target) { return target.rank->member == event.member; });
      const bool peer = std::find(source_.peers.begin(), source_.peers.end(), event.member) !=
                        source_.peers.end();
      return ours || peer ? event.status : absl::OkStatus();
    }
    case Event::Kind::kQuiesced:
    case Event::Kind::kCommitted:
      if (event.attempt != attempt_) return absl::OkStatus();
      waiting_.erase(event.member);
      return event.status;
    case Event::Kind::kPlanLoaded:
      if (event.plan != plan_) return absl::OkStatus();
      plan_loaded_ = true;
      return event.status;
    case Event::Kind::kStepDone:
      if (event.attempt != attempt_) return absl::OkStatus();
      running_ = false;
      touched_ = event.touched;
      return event.status;
    case Event::Kind::kWorkerLost:
      running_ = false;
      return event.status;
    case Event::Kind::kActorArrived:
    case Event::Kind::kActorLost:
    case Event::Kind::kAttached:
    case Event::Kind::kCancelled:
    case Event::Kind::kProgress:
      return absl::OkStatus();
  }
  return absl::OkStatus();
}

Status CatchUpSession::Prepare() {
  const auto& options = host_.options();
  WEIGHTD_RETURN_IF_ERROR(Wait(options.prepare, "worker", [this] {
    return std::all_of(view_.targets.begin(), view_.targets.end(),
                       [this](const TargetView& t) { return host_.Attached(t.rank->member); });
  }));
  host_.ApplyReplica(view_, ReplicaEvent::kCatchUp, absl::OkStatus());
  prepared_ = true;
  for (const TargetView& target : view_.targets) {
    waiting_.insert(target.rank->member);
    target.port->SendPrepare(attempt_, source_.version, true);
  }
  return Wait(options.prepare, "engine", [this] { return waiting_.empty(); });
}

Status CatchUpSession::Copy(Step step) {
  const std::shared_ptr<WorkerPort> worker = host_.Worker();
  if (worker == nullptr) {
    return Error(StatusCode::kUnavailable, reason::kWorkerLost, "it is being restarted",
                 "worker is not running: device=host");
  }
  // A plan without tensors: only the parameters of the targets and the members that hold them.
  WorkerPlan plan;
  plan.handle = plan_ = PlanCache::NextHandle();
  plan.table = std::make_shared<const TensorTable>();
  StepCommand command;
  command.attempt = attempt_;
  command.plan = plan_;
  command.version = source_.version;
  command.peers = source_.peers;
  command.step = step;
  for (const TargetView& target : view_.targets) {
    auto layout = std::make_shared<RankLayout>();
    layout->coordinates = target.rank->coordinates;
    layout->params = target.rank->params;
    command.targets.push_back(static_cast<uint32_t>(plan.targets.size()));
    plan.layouts.push_back(std::move(layout));
    plan.targets.push_back(target.rank->member);
    // Retained copies are kept by label: it names the layout, so that any replica with this layout
    // finds them.
    plan.labels.push_back(step == Step::kCopyPeer
                              ? target.rank->label
                              : fmt::format("{} rank {}", source_.layout_key, plan.labels.size()));
  }
  worker->SendPlan(plan);
  WEIGHTD_RETURN_IF_ERROR(Wait(host_.options().prepare, "worker", [this] { return plan_loaded_; }));
  running_ = true;
  touched_ = step != Step::kRetain;
  worker->SendStep(command);
  return Wait(host_.options().transfer, "worker", [this] { return !running_; });
}

Status CatchUpSession::Commit() {
  host_.ApplyReplica(view_, ReplicaEvent::kVerified, absl::OkStatus());
  for (const TargetView& target : view_.targets) {
    waiting_.insert(target.rank->member);
    target.port->SendCommit(attempt_, source_.version);
  }
  WEIGHTD_RETURN_IF_ERROR(
      Wait(host_.options().commit, "engine", [this] { return waiting_.empty(); }));
  host_.CommitCatchUp(view_, source_.version);
  return absl::OkStatus();
}

void CatchUpSession::Finish(const Status& status) {
  const std::shared_ptr<WorkerPort> worker = host_.Worker();
  if (running_ && worker != nullptr) {
    worker->SendCancel(attempt_);
    const Status stopped = Wait(milliseconds(3000), "worker", [this] { return !running_; });
    if (running_) worker->Kill("did not stop writing a cancelled catch-up");
    (void)stopped;
  }
  if (worker != nullptr && plan_ != 0) worker->SendDropPlan(plan_);
  if (!prepared_) return;
  if (!status.ok()) {
    host_.ApplyReplica(
        view_, touched_ ? ReplicaEvent::kFailedTouched : ReplicaEvent::kFailedUntouched, status);
  }
  ReplicaOutcome outcome;
  outcome.engine = view_.engine;
  outcome.dp_rank = view_.dp_rank;
  outcome.committed = status.ok();
  outcome.version = status.ok() ? source_.version : touched_ ? 0 : view_.version;
  outcome.state = host_.StateOf(view_);
  outcome.error = status;
  outcome.verified = status.ok() ? view_.verified() : "";
  for (const TargetView& target : view_.targets) {
    target.port->SendOutcome(attempt_, outcome, !touched_);
  }
}

}  // namespace weightd
