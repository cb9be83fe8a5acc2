#include "daemon/sync/room_host.h"

#include <algorithm>

#include "daemon/base/log.h"

namespace weightd {

GroupView RoomHost::ViewGroup() {
  const std::lock_guard lock(coordinator_.mu_);
  return coordinator_.ViewOf(*group_);
}

std::vector<ReplicaView> RoomHost::ViewReplicas() {
  std::vector<ReplicaView> views;
  GroupView group;
  std::map<std::string, std::shared_ptr<WorkerPort>> workers;
  {
    const std::lock_guard lock(coordinator_.mu_);
    views = coordinator_.ViewsOf(room_);
    if (group_ == nullptr) return views;
    group = coordinator_.ViewOf(*group_);
    workers = coordinator_.workers_;
  }
  for (uint64_t handle : room_.plans.Trim(group, views)) {
    for (const auto& [device, worker] : workers) worker->SendDropPlan(handle);
  }
  return views;
}

std::string RoomHost::IncompleteReplica() {
  const std::lock_guard lock(coordinator_.mu_);
  for (const auto& replica : room_.model.replicas()) {
    if (!replica->complete()) return replica->label();
  }
  return "";
}

AttemptId RoomHost::NextAttempt() {
  const std::lock_guard lock(coordinator_.mu_);
  return {coordinator_.config_.epoch, coordinator_.next_attempt_++};
}

uint64_t RoomHost::NextWire() {
  const std::lock_guard lock(coordinator_.mu_);
  return coordinator_.next_wire_++;
}

std::shared_ptr<WorkerPort> RoomHost::Worker(const std::string& device) {
  const std::lock_guard lock(coordinator_.mu_);
  const auto it = coordinator_.workers_.find(device);
  return it == coordinator_.workers_.end() ? nullptr : it->second;
}

Status RoomHost::AdmitVersion(uint64_t version) {
  const std::lock_guard lock(coordinator_.mu_);
  const std::vector<ReplicaView> views = coordinator_.ViewsOf(room_);
  const bool behind = std::any_of(views.begin(), views.end(),
                                  [&](const ReplicaView& view) { return view.version != version; });
  return room_.model.ledger().Admit(version, behind);
}

Status RoomHost::CheckRetry(uint64_t version, const std::string& layout, uint64_t digest) {
  const std::lock_guard lock(coordinator_.mu_);
  return room_.model.ledger().CheckRetry(version, layout, digest);
}

void RoomHost::ApplyReplica(const ReplicaView& view, ReplicaEvent event, const Status& error) {
  const std::lock_guard lock(coordinator_.mu_);
  Replica& replica = *view.handle;
  if (replica.generation != view.generation) return;  // a rank died or came meanwhile
  if (const Status status = replica.Apply(event); !status.ok()) {
    spdlog::error("{}", Message(status));
    return;
  }
  if (event == ReplicaEvent::kFailedTouched) replica.version = 0;
  if (!error.ok()) replica.error = error;
  coordinator_.Observe(room_, replica);
}

void RoomHost::CommitReplica(const ReplicaView& view, uint64_t version, const std::string& layout,
                             uint64_t digest) {
  const std::lock_guard lock(coordinator_.mu_);
  room_.model.ledger().Consume(version, layout, digest);
  Publish(view, version);
}

void RoomHost::CommitCatchUp(const ReplicaView& view, uint64_t version) {
  const std::lock_guard lock(coordinator_.mu_);
  Publish(view, version);
}

// \pre the coordinator is locked
void RoomHost::Publish(const ReplicaView& view, uint64_t version) {
  Replica& replica = *view.handle;
  if (replica.generation != view.generation) return;
  replica.version = version;
  replica.error = absl::OkStatus();
  if (const Status status = replica.Apply(ReplicaEvent::kCommitted); !status.ok()) {
    spdlog::error("{}", Message(status));
  }
  coordinator_.Observe(room_, replica);
}

ReplicaState RoomHost::StateOf(const ReplicaView& view) {
  const std::lock_guard lock(coordinator_.mu_);
  return view.handle->state;
}

Status RoomHost::ResolveLayouts(const GroupView& group, const ReplicaView& replica) {
  StatusOr<std::shared_ptr<const ResolvedReplica>> resolved = room_.plans.Resolve(group, replica);
  if (!resolved.ok()) return resolved.status();
  const std::lock_guard lock(coordinator_.mu_);
  replica.handle->loader = (*resolved)->loader;
  return absl::OkStatus();
}

StatusOr<std::shared_ptr<const ReplicaPlan>> RoomHost::PlanFor(const GroupView& group,
                                                               const ReplicaView& replica) {
  return room_.plans.Plan(group, replica);
}

bool RoomHost::Attached(MemberId member, const std::string& device) {
  const std::lock_guard lock(coordinator_.mu_);
  const auto it = coordinator_.members_.find(member);
  if (it == coordinator_.members_.end()) return false;
  if (it->second.attached.contains(device)) return true;
  coordinator_.LendTo(member, it->second, device);
  return false;
}

bool RoomHost::PlanLoaded(uint64_t handle, const std::string& device) {
  return room_.plans.Loaded(handle, device);
}

void RoomHost::MarkPlanLoaded(uint64_t handle, const std::string& device) {
  room_.plans.MarkLoaded(handle, device);
}

void RoomHost::ReserveVersion(uint64_t version) {
  if (Status status = coordinator_.store_.Save(room_.model.name(), version); !status.ok()) {
    spdlog::error("cannot save the version: {} model={} version={}", Message(status),
                  room_.model.name(), version);
  }
}

void RoomHost::ShowProgress(const SyncProgress& progress, const std::string& waiting_for) {
  const std::lock_guard lock(coordinator_.mu_);
  SyncView& live = room_.live;
  const auto now = Clock::now();
  if (progress.phase != live.progress.phase) {
    if (live.progress.phase != Phase::kNone) {
      AddTime(live.phases, live.progress.phase, MicrosSince(room_.phase_start));
    }
    room_.phase_start = now;
  }
  live.progress = progress;
  live.waiting_for = waiting_for;
  if (progress.phase == Phase::kTransfer && now > room_.phase_start) {
    PhaseTimes times = live.phases;  // with the rounds before
    AddTime(times, Phase::kTransfer, MicrosSince(room_.phase_start));
    const auto transfer = std::find_if(times.begin(), times.end(), [](const auto& time) {
      return time.first == Phase::kTransfer;
    });
    live.bytes_per_second = static_cast<double>(progress.bytes_done) /
                            (static_cast<double>(std::max<uint64_t>(transfer->second, 1)) * 1e-6);
  }
}

}  // namespace weightd
