// What the coordinator shows, and how it decides on catch-ups.
#include <algorithm>

#include "daemon/base/log.h"
#include "daemon/sync/catch_up.h"
#include "daemon/sync/room_host.h"

namespace weightd {
namespace {

std::vector<std::string> DevicesOf(const ReplicaView& view) {
  std::vector<std::string> devices;
  for (const TargetView& target : view.targets) devices.push_back(target.rank->device);
  return devices;
}

}  // namespace

GroupView Coordinator::ViewOf(const ActorGroup& group) const {
  GroupView view;
  view.id = group.id;
  view.generation = group.generation;
  view.world_size = group.world_size;
  view.table = group.table;
  view.ranks = group.ranks;
  view.lost = group.lost;
  view.superseded = group.superseded;
  return view;
}

ReplicaView Coordinator::ViewOf(const std::shared_ptr<Replica>& replica) const {
  ReplicaView view;
  view.handle = replica;
  view.engine = replica->engine;
  view.dp_rank = replica->dp_rank;
  view.generation = replica->generation;
  view.model = replica->model;
  view.state = replica->state;
  view.version = replica->version;
  for (const auto& [key, rank] : replica->ranks) {
    const auto port = engine_ports_.find(rank->member);
    view.targets.push_back({rank, port == engine_ports_.end() ? nullptr : port->second});
  }
  return view;
}

std::vector<ReplicaView> Coordinator::ViewsOf(const ModelRoom& room) const {
  std::vector<ReplicaView> views;
  for (const auto& replica : room.model.replicas()) {
    if (replica->complete() && replica->state != ReplicaState::kGone) {
      views.push_back(ViewOf(replica));
    }
  }
  return views;
}

std::vector<ModelView> Coordinator::Views(const std::string& model_or_empty) {
  const std::lock_guard lock(mu_);
  std::vector<ModelView> views;
  for (const auto& [name, room] : rooms_) {
    if (!model_or_empty.empty() && name != model_or_empty) continue;
    ModelView view;
    view.name = name;
    view.highest_version = room->model.ledger().highest();
    if (const auto group = room->model.CurrentGroup()) view.group = ViewOf(*group);
    for (const auto& replica : room->model.replicas()) view.replicas.push_back(*replica);
    view.sync = room->live;
    if (view.sync.running) {
      view.sync.elapsed_us = MicrosSince(room->sync_start);
      AddTime(view.sync.phases, view.sync.progress.phase, MicrosSince(room->phase_start));
    }
    view.history.assign(room->history.begin(), room->history.end());
    views.push_back(std::move(view));
  }
  return views;
}

StatusOr<PlanView> Coordinator::Plan(const std::string& model) {
  PlanView view;
  ModelRoom* room = nullptr;
  {
    const std::lock_guard lock(mu_);
    const auto it = rooms_.find(model);
    const auto group = it == rooms_.end() ? nullptr : it->second->model.CurrentGroup();
    if (group == nullptr || !group->complete()) {
      return Error(StatusCode::kNotFound, reason::kNoPlan,
                   "start the trainer and let every rank call register()",
                   "no complete trainer is registered: model={}", model);
    }
    room = it->second.get();
    view.group = ViewOf(*group);
    view.replicas = ViewsOf(*room);
    view.bytes_per_second = room->last_bytes_per_second;
  }
  if (view.replicas.empty()) {
    return Error(StatusCode::kNotFound, reason::kNoPlan, "start an engine with this model name",
                 "no engine is registered: model={}", model);
  }
  for (const ReplicaView& replica : view.replicas) {
    StatusOr<std::shared_ptr<const ResolvedReplica>> resolved =
        room->plans.Resolve(view.group, replica);
    if (!resolved.ok()) return WithRank(resolved.status(), replica.label());
    StatusOr<std::shared_ptr<const ReplicaPlan>> plan = room->plans.Plan(view.group, replica);
    if (!plan.ok()) return WithRank(plan.status(), replica.label());
    view.plans.push_back(*std::move(plan));
  }
  return view;
}

std::optional<bool> Coordinator::EngineReady(const std::string& engine) {
  const std::lock_guard lock(mu_);
  std::optional<bool> ready;
  for (const auto& [name, room] : rooms_) {
    for (const auto& replica : room->model.replicas()) {
      if (replica->engine != engine) continue;
      ready = ready.value_or(true) && IsReady(replica->state);
    }
  }
  return ready;
}

std::optional<CatchUpSource> Coordinator::FindCatchUp(const ModelRoom& room,
                                                      const ReplicaView& view) const {
  const uint64_t version = room.model.ledger().highest();
  if (!view.CheckCopyable().ok()) return std::nullopt;
  const std::string key = room.model.name() + " " + LayoutKey(view);
  for (const ReplicaView& peer : ViewsOf(room)) {
    if (peer.handle == view.handle || peer.state != ReplicaState::kServing ||
        peer.version != version || !peer.CheckCopyable().ok() ||
        room.model.name() + " " + LayoutKey(peer) != key) {
      continue;
    }
    CatchUpSource source{.version = version, .layout_key = key, .devices = DevicesOf(view)};
    for (const TargetView& target : peer.targets) source.peers.push_back(target.rank->member);
    return source;
  }
  if (room.retained_version == version && version > 0 && room.retained_layout == key) {
    return CatchUpSource{.version = version, .layout_key = key, .devices = room.retained_devices};
  }
  return std::nullopt;
}

// A replica that does not hold the published version, outside an attempt, may catch up if there is
// a source. True if it is about to.
bool Coordinator::MaybeCatchUp(ModelRoom& room, const std::shared_ptr<Replica>& replica) {
  const uint64_t version = room.model.ledger().highest();
  const bool idle = replica->state == ReplicaState::kRegistered ||
                    replica->state == ReplicaState::kPoisoned ||
                    replica->state == ReplicaState::kServing;
  if (!config_.sync.catch_up || draining_ || !idle || !replica->complete() || version == 0 ||
      replica->version == version) {
    return false;
  }
  const bool queued = std::any_of(room.jobs.begin(), room.jobs.end(),
                                  [&](const Job& job) { return job.catch_up == replica; });
  if (queued) return true;
  const ReplicaView view = ViewOf(replica);
  if (const Status copyable = view.CheckCopyable(); !copyable.ok()) {
    if (replica->error.ok()) replica->error = copyable;
    return false;
  }
  if (!FindCatchUp(room, view).has_value()) return false;
  Job job;
  job.mailbox = std::make_shared<Mailbox>();
  job.host = std::make_shared<RoomHost>(*this, room, nullptr);
  job.catch_up = replica;
  Enqueue(room, std::move(job));
  return true;
}

void Coordinator::TellIdle(const ModelRoom& room, const ReplicaView& view) {
  const uint64_t version = room.model.ledger().highest();
  const bool behind = version > 0 && view.version != version;
  for (const TargetView& target : view.targets) {
    if (target.port == nullptr) continue;
    target.port->SendIdle(0, behind ? view.CheckCopyable() : absl::OkStatus());
  }
}

// After a sync: one replica that serves the newest version is copied for those that come late.
void Coordinator::MaybeRetain(ModelRoom& room) {
  const uint64_t version = room.model.ledger().highest();
  if (!config_.sync.retain_on_host || draining_ || room.retained_version == version) return;
  for (const auto& replica : room.model.replicas()) {
    if (replica->state != ReplicaState::kServing || replica->version != version) continue;
    if (!ViewOf(replica).CheckCopyable().ok()) continue;
    Job job;
    job.mailbox = std::make_shared<Mailbox>();
    job.host = std::make_shared<RoomHost>(*this, room, nullptr);
    job.retain = replica;
    job.version = version;
    Enqueue(room, std::move(job));
    return;
  }
}

void Coordinator::RunRetain(ModelRoom& room, const Job& job, std::unique_lock<std::mutex>& lock) {
  const ReplicaView view = ViewOf(job.retain);
  if (view.state != ReplicaState::kServing || view.version != job.version) return;
  const std::string key = room.model.name() + " " + LayoutKey(view);
  room.retained_version = 0;
  lock.unlock();
  const std::vector<std::string> devices = DevicesOf(view);
  CatchUpSession session(*job.host, *job.mailbox, view,
                         {.version = job.version, .layout_key = key, .devices = devices});
  const Status status = session.Retain();
  lock.lock();
  if (!status.ok()) {
    spdlog::warn("cannot keep a copy: {} model={} version={}", Message(status), room.model.name(),
                 job.version);
    return;
  }
  spdlog::info("a copy is kept for late engines: model={} version={} devices={}", room.model.name(),
               job.version, fmt::join(devices, ","));
  room.retained_version = job.version;
  room.retained_layout = key;
  room.retained_devices = devices;
  for (const auto& replica : room.model.replicas()) (void)MaybeCatchUp(room, replica);
}

void Coordinator::RunCatchUp(ModelRoom& room, const Job& job, std::unique_lock<std::mutex>& lock) {
  ReplicaView view = ViewOf(job.catch_up);
  const std::optional<CatchUpSource> source = FindCatchUp(room, view);
  if (!job.catch_up->complete() || !source.has_value()) return TellIdle(room, view);
  lock.unlock();
  CatchUpSession session(*job.host, *job.mailbox, view, *source);
  const Status status = session.Run();
  lock.lock();
  if (status.ok()) {
    spdlog::info("engine has caught up: {} model={} version={} source={}", view.label(),
                 room.model.name(), source->version,
                 source->peers.empty() ? "retained copy" : "serving peer");
  } else {
    spdlog::warn("engine could not catch up: {} model={} {}", view.label(), room.model.name(),
                 Message(status));
  }
}

}  // namespace weightd
