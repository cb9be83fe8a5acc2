// How a sync joins its workers by wires, where bytes must be sent: one per replica, opened before
// the engines are asked to pause, kept for later syncs, and given up with the first transfer that
// fails.
#include <algorithm>

#include "daemon/sync/sync_session.h"

namespace weightd {
namespace {

std::string WorkerName(const std::string& device) { return "worker " + device; }

}  // namespace

// One worker makes an identity, then all join under it. A wire that is open already is used again.
Status SyncSession::OpenWires() {
  for (ReplicaRun* run : Viable()) {
    const std::vector<std::string> devices = WireDevices(run->plan->worker->wire_pairs);
    if (devices.empty()) continue;
    run->wire = host_.FindWire(run->plan->worker->handle);
    if (run->wire != 0) continue;
    if (Status status = CheckWire(*run); !status.ok()) {
      Fail(*run, std::move(status));
      continue;
    }
    run->wire = host_.NextWire();
    run->opening = true;
    run->joining.insert(devices.front());
    host_.Worker(devices.front())->SendMakeWireId(run->wire);
  }
  WEIGHTD_RETURN_IF_ERROR(AwaitWorkers(host_.options().prepare));
  {
    const std::lock_guard issue(host_.issue_mutex());
    for (ReplicaRun* run : Viable()) {
      if (run->opening) OfferWire(*run);
    }
  }
  WEIGHTD_RETURN_IF_ERROR(AwaitWorkers(host_.options().prepare));
  for (ReplicaRun* run : Viable()) {
    if (!run->opening) continue;
    run->opening = false;
    const WorkerPlan& plan = *run->plan->worker;
    host_.KeepWire(plan.handle, run->wire, WireDevices(plan.wire_pairs));
  }
  return absl::OkStatus();
}

// Whether all workers of a wire are there and have the same NCCL, which refuses to talk to another.
Status SyncSession::CheckWire(const ReplicaRun& run) const {
  std::map<uint32_t, std::string> versions;  // to one of the devices
  for (const std::string& device : WireDevices(run.plan->worker->wire_pairs)) {
    const std::shared_ptr<WorkerPort> worker = host_.Worker(device);
    if (worker == nullptr) return NoWorkerError(device);
    if (IsHostDevice(device)) continue;
    const WorkerFacts facts = worker->facts();
    if (facts.nccl_version == 0) {
      return WithPeer(Error(StatusCode::kFailedPrecondition, reason::kNoPath,
                            "install NCCL (libnccl.so.2) where the loader finds it, e.g. name its "
                            "folder in LD_LIBRARY_PATH, and restart the daemon",
                            "worker has no NCCL: device={} cause={}", device, facts.nccl_problem),
                      WorkerName(device));
    }
    versions.emplace(facts.nccl_version, device);
  }
  if (versions.size() <= 1) return absl::OkStatus();
  const auto& [first, first_device] = *versions.begin();
  const auto& [last, last_device] = *versions.rbegin();
  return WithPeer(Error(StatusCode::kFailedPrecondition, reason::kNcclVersion,
                        "let all workers load the same libnccl.so.2, then restart the daemon",
                        "workers have different versions of NCCL: {} on {}, {} on {}", first,
                        first_device, last, last_device),
                  WorkerName(last_device));
}

void SyncSession::OfferWire(ReplicaRun& run) {
  const std::vector<std::string> devices = WireDevices(run.plan->worker->wire_pairs);
  for (const std::string& device : devices) {
    const std::shared_ptr<WorkerPort> worker = host_.Worker(device);
    if (worker == nullptr) return Fail(run, NoWorkerError(device));
    run.joining.insert(device);
    worker->SendOpenWire({.wire = run.wire,
                          .plan = run.plan->worker->handle,
                          .id = run.wire_id,
                          .deadline = host_.options().prepare});
  }
}

void SyncSession::OnWireEvent(const Event& event) {
  heard_[event.device] = Clock::now();
  for (ReplicaRun& run : replicas_) {
    if (event.wire == 0 || run.wire != event.wire || run.joining.erase(event.device) == 0) continue;
    if (!event.status.ok()) {
      Fail(run, WithPeer(event.status, WorkerName(event.device)));
    } else if (event.kind == Event::Kind::kWireId) {
      run.wire_id = event.wire_id;
    }
  }
}

// Of a replica that has failed: a wire on which a transfer was going on is of no more use, nor is
// one that not all have joined. Its workers end it once they are done with the attempt.
void SyncSession::LetGoOfWire(ReplicaRun& run) {
  run.joining.clear();
  if (run.wire == 0 || (!run.opening && phase_ != Phase::kTransfer)) return;
  const WorkerPlan& plan = *run.plan->worker;
  host_.DropWire(plan.handle);
  for (const std::string& device : WireDevices(plan.wire_pairs)) {
    if (const auto worker = host_.Worker(device)) worker->SendCloseWire(run.wire);
  }
}

}  // namespace weightd
