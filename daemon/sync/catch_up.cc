#include "daemon/sync/catch_up.h"

#include <algorithm>

#include "daemon/sync/plan_cache.h"

namespace weightd {
namespace {

constexpr milliseconds kFenceLimit{3000};

}  // namespace

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
  Status status = Copy(Step::kRetain);
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
      plan_waiting_.erase(event.device);
      return event.status;
    case Event::Kind::kStepDone:
      if (event.attempt != attempt_) return absl::OkStatus();
      running_.erase(event.device);
      if (!event.touched) writers_.erase(event.device);
      return event.status;
    case Event::Kind::kWorkerLost:
      if (!Devices().contains(event.device)) return absl::OkStatus();
      running_.erase(event.device);
      return event.status;
    case Event::Kind::kShutdown:
      running_.clear();
      return event.status;
    case Event::Kind::kActorArrived:
    case Event::Kind::kActorLost:
    case Event::Kind::kConverted:
    case Event::Kind::kAttached:
    case Event::Kind::kCancelled:
    case Event::Kind::kProgress:
    case Event::Kind::kLanded:
    case Event::Kind::kWireId:
    case Event::Kind::kWireReady:
      return absl::OkStatus();
  }
  return absl::OkStatus();
}

Status CatchUpSession::Prepare() {
  const auto& options = host_.options();
  WEIGHTD_RETURN_IF_ERROR(Wait(options.prepare, "worker", [this] { return Lent(); }));
  host_.ApplyReplica(view_, ReplicaEvent::kCatchUp, absl::OkStatus());
  prepared_ = true;
  for (const TargetView& target : view_.targets) {
    waiting_.insert(target.rank->member);
    target.port->SendPrepare(attempt_, source_.version, true);
  }
  return Wait(options.prepare, "engine", [this] { return waiting_.empty(); });
}

// Target and source lend their memory to the worker that copies.
bool CatchUpSession::Lent() {
  bool lent = true;
  for (size_t i = 0; i < view_.targets.size(); ++i) {
    lent = host_.Attached(view_.targets[i].rank->member, source_.devices[i]) && lent;
    if (source_.peers.empty()) continue;
    lent = host_.Attached(source_.peers[i], source_.devices[i]) && lent;
  }
  return lent;
}

// A plan without tensors: only the parameters of the targets and the members that hold them.
WorkerPlan CatchUpSession::MakePlan(Step step) const {
  WorkerPlan plan;
  plan.handle = plan_;
  plan.table = std::make_shared<const TensorTable>();
  for (const TargetView& target : view_.targets) {
    auto layout = std::make_shared<RankLayout>();
    layout->coordinates = target.rank->coordinates;
    layout->params = target.rank->params;
    plan.layouts.push_back(std::move(layout));
    plan.targets.push_back(target.rank->member);
    plan.target_devices.push_back(target.rank->device);
    // Retained copies are kept by label: it names the layout, so that any replica with this layout
    // finds them.
    plan.labels.push_back(step == Step::kCopyPeer
                              ? target.rank->label
                              : fmt::format("{} rank {}", source_.layout_key, plan.labels.size()));
  }
  return plan;
}

Status CatchUpSession::Copy(Step step) {
  plan_ = PlanCache::NextHandle();
  const WorkerPlan plan = MakePlan(step);
  std::map<std::string, std::shared_ptr<WorkerPort>> workers;
  for (const std::string& device : Devices()) {
    workers[device] = host_.Worker(device);
    if (workers[device] != nullptr) continue;
    return WithPeer(Error(StatusCode::kUnavailable, reason::kWorkerLost, "it is being restarted",
                          "worker is not running: device={}", device),
                    "worker " + device);
  }
  plan_waiting_ = Devices();
  for (const auto& [device, worker] : workers) worker->SendPlan(plan);
  WEIGHTD_RETURN_IF_ERROR(
      Wait(host_.options().prepare, "worker", [this] { return plan_waiting_.empty(); }));
  for (const auto& [device, worker] : workers) {
    StepCommand command;
    command.attempt = attempt_;
    command.step = step;
    command.plan = plan_;
    command.version = source_.version;
    for (uint32_t i = 0; i < source_.devices.size(); ++i) {
      if (source_.devices[i] != device) continue;
      command.targets.push_back(i);
      if (!source_.peers.empty()) command.peers.push_back(source_.peers[i]);
    }
    running_.insert(device);
    if (step != Step::kRetain) writers_.insert(device);
    worker->SendStep(command);
  }
  return Wait(host_.options().transfer, "worker", [this] { return running_.empty(); });
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

// Nobody writes any more when this returns: every worker has answered, or is dead.
void CatchUpSession::Fence() {
  for (const std::string& device : running_) {
    if (const auto worker = host_.Worker(device)) worker->SendCancel(attempt_);
  }
  const auto deadline = Clock::now() + kFenceLimit;
  while (!running_.empty()) {
    const std::optional<Event> event = mailbox_.Wait(deadline);
    if (!event.has_value()) break;
    (void)Handle(*event);
  }
  for (const std::string& device : running_) {
    if (const auto worker = host_.Worker(device)) {
      worker->Kill("did not stop writing a cancelled catch-up");
    }
  }
}

void CatchUpSession::Finish(const Status& status) {
  Fence();
  for (const std::string& device : Devices()) {
    const std::shared_ptr<WorkerPort> worker = host_.Worker(device);
    if (worker != nullptr && plan_ != 0) worker->SendDropPlan(plan_);
  }
  const bool touched = !writers_.empty();
  if (!prepared_) return;
  if (!status.ok()) {
    host_.ApplyReplica(
        view_, touched ? ReplicaEvent::kFailedTouched : ReplicaEvent::kFailedUntouched, status);
  }
  ReplicaOutcome outcome;
  outcome.engine = view_.engine;
  outcome.dp_rank = view_.dp_rank;
  outcome.committed = status.ok();
  outcome.version = status.ok() ? source_.version : touched ? 0 : view_.version;
  outcome.state = host_.StateOf(view_);
  outcome.error = status;
  outcome.verified = status.ok() ? view_.verified() : "";
  for (const TargetView& target : view_.targets) {
    target.port->SendOutcome(attempt_, outcome, !touched);
  }
}

}  // namespace weightd
