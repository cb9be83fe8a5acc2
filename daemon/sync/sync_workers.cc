// How a running sync drives its workers, one per device: each gets the whole plan and does its own
// share of every step. Nobody waits for a worker longer than a deadline without a sign of life.
#include <algorithm>

#include "daemon/plan/data_path.h"
#include "daemon/sync/sync_session.h"

namespace weightd {
namespace {

constexpr milliseconds kFenceLimit{3000};

// A GPU reads this much in half a millisecond, and telling it what has landed costs some 0.3.
constexpr uint64_t kBytesWorthFollowing = 2u << 30;

std::string WorkerName(const std::string& device) { return "worker " + device; }

}  // namespace

bool ReplicaPlan::Uses(const std::string& device) const {
  return std::any_of(shares.begin(), shares.end(),
                     [&](const WorkerShare& share) { return share.device == device; });
}

Status SyncSession::NoWorkerError(const std::string& device) {
  return WithPeer(Error(StatusCode::kUnavailable, reason::kWorkerLost,
                        "it is being restarted: sync again; see the daemon's log if it stays away",
                        "worker is not running: device={}", device),
                  WorkerName(device));
}

Status SyncSession::LoadPlans() {
  for (ReplicaRun* run : Viable()) {
    const uint64_t handle = run->plan->worker->handle;
    for (const WorkerShare& share : run->plan->shares) {
      if (host_.PlanLoaded(handle, share.device)) continue;
      const std::shared_ptr<WorkerPort> worker = host_.Worker(share.device);
      if (worker == nullptr) {
        Fail(*run, NoWorkerError(share.device));
        break;
      }
      if (!plans_waiting_.emplace(handle, share.device).second) continue;
      worker->SendPlan(*run->plan->worker);
    }
  }
  return AwaitWorkers(host_.options().prepare);
}

Status SyncSession::OnPlanLoaded(const Event& event) {
  heard_[event.device] = Clock::now();
  plans_waiting_.erase({event.plan, event.device});
  for (ReplicaRun* run : Viable()) {
    if (run->plan == nullptr || run->plan->worker->handle != event.plan) continue;
    if (!event.status.ok()) {
      Fail(*run, WithPeer(event.status, WorkerName(event.device)));
    } else if (event.digest != run->plan->worker->digest) {
      Fail(*run,
           WithPeer(Error(StatusCode::kInternal, reason::kPlanMismatch,
                          "run daemon and workers of one release; report this if they are",
                          "daemon and worker computed different plans: {}", run->view.label()),
                    WorkerName(event.device)));
    } else {
      host_.MarkPlanLoaded(event.plan, event.device);
    }
  }
  return absl::OkStatus();
}

Status SyncSession::RunStep(Step step, milliseconds limit) {
  {
    const std::lock_guard issue(host_.issue_mutex());
    for (ReplicaRun* run : Viable()) SendSteps(*run, step, limit);
    if (step == Step::kTransfer) {
      for (ReplicaRun* run : Viable()) StartFollowing(*run);
    }
  }
  WEIGHTD_RETURN_IF_ERROR(AwaitWorkers(limit));
  return CheckAnyViable();
}

// What a worker has to do in a step of this round; without targets: nothing.
StepCommand SyncSession::CommandOf(const ReplicaRun& run, const WorkerShare& share,
                                   Step step) const {
  StepCommand command;
  command.targets = step == Step::kTransfer ? share.writes : share.verifies;
  std::erase_if(command.targets,
                [&](uint32_t target) { return round_ >= run.view.targets[target].num_rounds(); });
  command.attempt = run.attempt;
  command.step = step;
  command.plan = run.plan->worker->handle;
  command.version = version_;
  command.round = round_;
  return command;
}

void SyncSession::SendSteps(ReplicaRun& run, Step step, milliseconds limit) {
  run.bytes_done.clear();
  const bool transfers = step == Step::kTransfer;
  if (!transfers) run.running.merge(run.following);  // now it is waited for
  for (const WorkerShare& share : run.plan->shares) {
    StepCommand command = CommandOf(run, share, step);
    if (command.targets.empty() || run.followed.contains(share.device)) continue;
    const std::shared_ptr<WorkerPort> worker = host_.Worker(share.device);
    if (worker == nullptr) return Fail(run, NoWorkerError(share.device));
    if (transfers && run.wire != 0) {
      command.wire = run.wire;
      command.turn_deadline = limit * 7 / 8;  // a worker names what it waits for, the session who
    }
    run.running.insert(share.device);
    if (transfers) run.writers.insert(share.device);
    worker->SendStep(command);
  }
}

bool SyncSession::VerifiesBeside(const ReplicaRun& run, const std::string& device) const {
  if (host_.options().verify_when != VerifyWhen::kAuto) {
    return host_.options().verify_when == VerifyWhen::kBeside;
  }
  return IsGpuDevice(device) &&
         run.plan->compiled->bytes / run.view.num_rounds() >= kBytesWorthFollowing;
}

// The verification that runs beside the transfer which has just been sent.
void SyncSession::StartFollowing(ReplicaRun& run) {
  for (const WorkerShare& share : run.plan->shares) {
    for (const uint32_t target : share.stores) {
      if (round_ < run.view.targets[target].num_rounds()) run.landed[target][share.device] = 0;
    }
  }
  for (const WorkerShare& share : run.plan->shares) {
    const std::shared_ptr<WorkerPort> worker = host_.Worker(share.device);
    if (!VerifiesBeside(run, share.device)) continue;
    if (worker == nullptr || !worker->facts().follows) continue;
    StepCommand command = CommandOf(run, share, Step::kVerify);
    if (command.targets.empty()) continue;
    command.follows = true;
    run.following.insert(share.device);
    run.followed.insert(share.device);
    worker->SendStep(command);
  }
}

// Tells the worker that verifies a target how far all that store into it have come.
void SyncSession::OnLanded(ReplicaRun& run, const std::string& device, uint32_t target,
                           uint32_t writes) {
  const auto known = run.landed.find(target);
  if (known == run.landed.end()) return;
  const auto by_device = known->second.find(device);
  if (by_device == known->second.end()) return;
  by_device->second = std::max(by_device->second, writes);
  const auto by_writes = [](const auto& a, const auto& b) { return a.second < b.second; };
  const uint32_t all =
      std::min_element(known->second.begin(), known->second.end(), by_writes)->second;
  if (all <= run.landed_told[target]) return;
  run.landed_told[target] = all;
  for (const WorkerShare& share : run.plan->shares) {
    const bool verifies =
        std::find(share.verifies.begin(), share.verifies.end(), target) != share.verifies.end();
    if (!verifies || !run.following.contains(share.device)) continue;
    const std::shared_ptr<WorkerPort> worker = host_.Worker(share.device);
    if (worker != nullptr) worker->SendLanded({run.attempt, round_, target, all});
  }
}

// This device's part of the transfer is over.
void SyncSession::OnAllLanded(ReplicaRun& run, const std::string& device) {
  for (const auto& [target, devices] : run.landed) OnLanded(run, device, target, kAllWrites);
}

Status SyncSession::OnStepDone(const Event& event) {
  heard_[event.device] = Clock::now();
  if (event.step == Step::kCheckReplicas && event.attempt == check_attempt_) {
    check_waiting_.erase(event.device);
    shard_words_[event.device] = event.shard_words;
    return event.status;
  }
  ReplicaRun* run = FindAttempt(event.attempt);
  if (run == nullptr) return absl::OkStatus();
  const bool followed = event.step == Step::kVerify && run->following.erase(event.device) > 0;
  if (!followed && run->running.erase(event.device) == 0) return absl::OkStatus();
  if (event.step == Step::kTransfer && !event.touched) run->writers.erase(event.device);
  if (event.step == Step::kVerify) run->bytes_verified += event.bytes;
  if (!event.status.ok()) {
    // Whatever ends the verification beside a transfer ends the transfer.
    Fail(*run, followed ? MovedToPhase(event.status, Name(phase_)) : event.status);
    return absl::OkStatus();
  }
  if (event.step == Step::kTransfer) OnAllLanded(*run, event.device);
  auto& sums = event.step == Step::kTransfer ? run->source_digests : run->target_digests;
  for (const TargetDigests& part : event.digests) {
    if (Status status = AddDigests(part, sums); !status.ok()) {
      Fail(*run, WithPeer(std::move(status), WorkerName(event.device)));
    }
  }
  return absl::OkStatus();
}

// Devices whose worker owes an answer that some replica, or the sync, still waits for.
std::set<std::string> SyncSession::OwingWorkers() const {
  std::set<std::string> owing = check_waiting_;
  for (const auto& [plan, device] : plans_waiting_) owing.insert(device);
  for (const ReplicaRun& run : replicas_) {
    if (!run.viable()) continue;
    owing.insert(run.running.begin(), run.running.end());
    owing.insert(run.joining.begin(), run.joining.end());
  }
  return owing;
}

// Waits until no worker owes an answer. One that gives no sign of life for `limit` fails the
// replicas that need it; the others go on.
Status SyncSession::AwaitWorkers(milliseconds limit) {
  for (const std::string& device : OwingWorkers()) heard_[device] = Clock::now();
  while (true) {
    const std::set<std::string> owing = OwingWorkers();
    if (owing.empty()) return absl::OkStatus();
    const std::string& stalest =
        *std::min_element(owing.begin(), owing.end(),
                          [this](const auto& a, const auto& b) { return heard_[a] < heard_[b]; });
    const std::optional<Event> event = mailbox_.Wait(heard_[stalest] + limit);
    WEIGHTD_RETURN_IF_ERROR(event.has_value()
                                ? Handle(*event)
                                : LoseWorker(stalest, DeadlineError(limit, WorkerName(stalest))));
  }
}

// The worker will not answer. What it has to do with an attempt is settled by the fence, unless it
// is dead. Only the comparison of the trainer's own shards concerns all replicas.
Status SyncSession::LoseWorker(const std::string& device, const Status& error) {
  std::erase_if(plans_waiting_, [&](const auto& waiting) { return waiting.second == device; });
  const bool compares = check_waiting_.erase(device) > 0;
  if (verified()) return absl::OkStatus();
  for (ReplicaRun* run : Viable()) {
    if (run->plan != nullptr && run->plan->Uses(device)) Fail(*run, error);
  }
  return compares ? error : absl::OkStatus();
}

// Waits until every worker has answered every step that is out. After this nobody writes for these
// attempts or reads the trainer's memory: each worker that was asked to said so, or is dead.
void SyncSession::Fence() {
  for (const std::string& device : check_waiting_) {
    if (const auto worker = host_.Worker(device)) worker->SendCancel(check_attempt_);
  }
  const auto running = [this] {
    std::set<std::string> devices = check_waiting_;
    for (const ReplicaRun& run : replicas_) {
      devices.insert(run.running.begin(), run.running.end());
      devices.insert(run.following.begin(), run.following.end());
    }
    return devices;
  };
  auto deadline = Clock::now() + kFenceLimit;
  bool killed = false;
  while (!running().empty()) {
    const std::optional<Event> event = mailbox_.Wait(deadline);
    if (event.has_value()) {
      (void)Handle(*event);
      continue;
    }
    if (killed) break;
    for (const std::string& device : running()) {
      const std::shared_ptr<WorkerPort> worker = host_.Worker(device);
      if (worker == nullptr) continue;  // its loss was reported before
      worker->Kill("did not stop writing a cancelled attempt");
      killed = true;
    }
    if (!killed) break;
    deadline = Clock::now() + kFenceLimit;
  }
}

// Compares what trainer ranks hold alike: inside its device by each worker, across devices here.
Status SyncSession::CheckReplicas() {
  if (Viable().empty()) return absl::OkStatus();
  const ReplicaPlan& plan = *Viable().front()->plan;
  StepCommand command;
  command.attempt = check_attempt_ = host_.NextAttempt();
  command.step = Step::kCheckReplicas;
  command.plan = plan.worker->handle;
  const std::set<std::string> devices(plan.worker->source_devices.begin(),
                                      plan.worker->source_devices.end());
  for (const std::string& device : devices) {
    const std::shared_ptr<WorkerPort> worker = host_.Worker(device);
    if (worker == nullptr) return NoWorkerError(device);
    check_waiting_.insert(device);
    worker->SendStep(command);
  }
  WEIGHTD_RETURN_IF_ERROR(AwaitWorkers(host_.options().verify));
  return devices.size() > 1 ? CompareShardWords() : absl::OkStatus();
}

}  // namespace weightd
