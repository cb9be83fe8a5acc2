// The coordinator's dealings with clients: joining, registering, leaving.
#include <algorithm>
#include <unordered_set>

#include "daemon/base/failpoint.h"
#include "daemon/base/log.h"
#include "daemon/base/worker_command.h"
#include "daemon/sync/room_host.h"

namespace weightd {
namespace {

template <typename Items>
Status CheckUnique(const Items& items, const char* what) {
  std::unordered_set<std::string_view> names;
  for (const auto& item : items) {
    if (!names.insert(item.name).second) {
      return WithTensor(
          Error(StatusCode::kInvalidArgument, reason::kDuplicateTensor, "register every name once",
                "{} is registered twice: {}", what, item.name),
          item.name);
    }
  }
  return absl::OkStatus();
}

}  // namespace

// Whether one more client may join. \pre locked
Status Coordinator::CheckJoin() const {
  if (draining_) {
    return Error(StatusCode::kUnavailable, reason::kDraining, "connect again after its restart",
                 "the daemon is shutting down");
  }
  if (sessions_ < config_.max_sessions) return absl::OkStatus();
  return Error(StatusCode::kResourceExhausted, reason::kTooManySessions,
               "raise limits.max_sessions in the daemon's configuration, or stop other clients",
               "too many trainer and engine ranks are connected: limit={}", config_.max_sessions);
}

Status Coordinator::CheckCount(size_t count) const {
  if (count <= config_.max_tensors) return absl::OkStatus();
  return Error(StatusCode::kResourceExhausted, reason::kMessageTooLarge,
               "raise limits.max_tensors in the daemon's configuration",
               "too many tensors or parameters: limit={}", config_.max_tensors);
}

StatusOr<std::shared_ptr<ActorSession>> Coordinator::JoinActor(const ActorIdentity& identity,
                                                               std::shared_ptr<ActorPort> port) {
  const std::lock_guard lock(mu_);
  WEIGHTD_RETURN_IF_ERROR(CheckJoin());
  if (static_cast<uint64_t>(std::max(identity.world_size, 0)) > config_.max_sessions) {
    return Error(StatusCode::kInvalidArgument, reason::kWorldSize,
                 "pass the world size of the trainer, or raise limits.max_sessions in the daemon's "
                 "configuration",
                 "world size is beyond the daemon's limit: world_size={} limit={}",
                 identity.world_size, config_.max_sessions);
  }
  ModelRoom& room = RoomFor(identity.model);
  auto session = std::make_shared<ActorSession>();
  WEIGHTD_ASSIGN_OR_RETURN(session->group,
                           room.model.JoinGroup(identity.group, identity.group_order,
                                                identity.world_size, identity.rank));
  session->identity = identity;
  session->port = std::move(port);
  session->room = &room;
  ++sessions_;
  return session;
}

bool Coordinator::WantsTable(const ActorSession& session, const std::string& digest) {
  const std::lock_guard lock(mu_);
  return session.group->table == nullptr || session.group->table_digest != digest;
}

Status Coordinator::CheckTable(const ActorGroup& group, const std::string& digest,
                               const std::optional<TensorTable>& table,
                               const std::string& label) const {
  if (!table.has_value()) {
    if (group.table != nullptr && group.table_digest == digest) return absl::OkStatus();
    return Error(StatusCode::kInvalidArgument, reason::kProtocol,
                 "use the client library of this release", "{} registered without a table", label);
  }
  WEIGHTD_RETURN_IF_ERROR(CheckUnique(*table, "tensor"));
  const bool alone = group.registered() == 0;
  if (group.table == nullptr || alone || group.table_digest == digest) return absl::OkStatus();
  std::string tensor = "number of tensors";
  std::string difference =
      fmt::format("{} has {} tensors, others {}", label, table->size(), group.table->size());
  for (size_t i = 0; i < table->size() && i < group.table->size(); ++i) {
    const TensorInfo& mine = (*table)[i];
    const TensorInfo& theirs = (*group.table)[i];
    if (mine == theirs) continue;
    tensor = mine.name;
    difference =
        fmt::format("{} has {} {} {}, others have {} {} {}", label, mine.name, Name(mine.dtype),
                    ToString(mine.shape), theirs.name, Name(theirs.dtype), ToString(theirs.shape));
    break;
  }
  return MakeError(StatusCode::kInvalidArgument,
                   "ranks registered different tensors: " + difference,
                   {.reason = reason::kTableMismatch,
                    .tensor = tensor,
                    .rank = label,
                    .remedy = "register the same tensors, in the same order, on every rank"});
}

StatusOr<WorkerEndpoint> Coordinator::RegisterActor(ActorSession& session,
                                                    const std::string& device,
                                                    const std::string& digest,
                                                    std::optional<TensorTable> table,
                                                    RankShards shards) {
  WorkerEndpoint endpoint;
  std::string label;
  {
    const std::lock_guard lock(mu_);
    ActorGroup& group = *session.group;
    label = fmt::format("actor {}", session.identity.rank);
    const bool spawns = session.identity.spawns_worker;
    WEIGHTD_RETURN_IF_ERROR(CheckDevice(device, label, spawns));
    WEIGHTD_RETURN_IF_ERROR(WithRank(CheckTable(group, digest, table, label), label));
    if (table.has_value()) {
      group.table = std::make_shared<const TensorTable>(*std::move(table));
      group.table_digest = digest;
    }
    if (shards.first.size() != group.table->size() + 1) {
      return Error(StatusCode::kInvalidArgument, reason::kProtocol,
                   "use the client library of this release", "{} sent shards of {} tensors, not {}",
                   label, shards.first.size() - 1, group.table->size());
    }
    if (session.member != MemberId::kNone) RemoveMember(session.member);
    endpoint = AddMember(*session.room, device, label, false);
    session.member = endpoint.member;
    members_[session.member].actor = session.port;
    auto rank = std::make_shared<ActorRank>();
    rank->member = session.member;
    rank->rank = session.identity.rank;
    rank->label = label;
    rank->process = session.identity.process;
    rank->device = device;
    rank->shards = std::move(shards);
    session.room->model.SetActor(group, std::move(rank));
    LendToTrainer(*session.room, device);
    if (spawns) OfferWorker(session.port, label, session.identity.process, device);
  }
  Failpoint("registered");
  return endpoint;
}

void Coordinator::LeaveActor(ActorSession& session, const Status& cause) {
  const std::lock_guard lock(mu_);
  if (session.room == nullptr) return;
  const std::string label = fmt::format("actor {}", session.identity.rank);
  Event event;
  event.kind = Event::Kind::kActorLost;
  event.member = session.member;
  event.status = WithPeer(
      Error(StatusCode::kUnavailable, reason::kPeerLost, "start the trainer again (all ranks)",
            "a trainer rank is gone: {} ({}): {}", label, session.identity.process,
            cause.ok() ? "it closed its session" : Message(cause)),
      label);
  Post(*session.room, event);
  if (session.member != MemberId::kNone) RemoveMember(session.member);
  spawned_.Withdraw(session.port.get());
  session.room->model.LeaveGroup(session.group, session.identity.rank);
  session.room = nullptr;
  --sessions_;
}

StatusOr<std::shared_ptr<EngineSession>> Coordinator::JoinEngine(const EngineIdentity& identity,
                                                                 std::shared_ptr<EnginePort> port) {
  const std::lock_guard lock(mu_);
  WEIGHTD_RETURN_IF_ERROR(CheckJoin());
  ModelRoom& room = RoomFor(identity.model);
  auto session = std::make_shared<EngineSession>();
  WEIGHTD_ASSIGN_OR_RETURN(
      session->replica,
      room.model.JoinReplica(identity.engine, identity.coordinates, identity.num_ranks));
  session->identity = identity;
  session->port = std::move(port);
  session->room = &room;
  ++sessions_;
  return session;
}

StatusOr<std::vector<WorkerEndpoint>> Coordinator::RegisterEngine(
    EngineSession& session, const std::string& device, EngineModel model,
    std::vector<ParamInfo> params, std::shared_ptr<const TracedLayout> trace, bool prefer_trace) {
  const Status found = loaders_->CheckProfile(model.architecture, model.profile, params);
  model.traced = trace != nullptr && (prefer_trace || !found.ok());
  if (!model.traced) {
    WEIGHTD_RETURN_IF_ERROR(found);
    trace = nullptr;
  }
  WEIGHTD_RETURN_IF_ERROR(CheckUnique(params, "parameter"));
  WEIGHTD_RETURN_IF_ERROR(CheckStages(params));
  if (!model.commit_mode.empty() && model.commit_mode != "in_place") {
    return Error(StatusCode::kInvalidArgument, reason::kConfig, "use commit_mode \"in_place\"",
                 "commit mode is not supported: {}", model.commit_mode);
  }
  std::vector<WorkerEndpoint> endpoints;
  {
    const std::lock_guard lock(mu_);
    const EngineIdentity& identity = session.identity;
    const std::string label =
        fmt::format("engine {} dp {} pp {} tp {}", identity.engine, identity.coordinates.dp_rank,
                    identity.coordinates.pp_rank, identity.coordinates.tp_rank);
    WEIGHTD_RETURN_IF_ERROR(CheckDevice(device, label, identity.spawns_worker));
    if (session.member != MemberId::kNone) RemoveMember(session.member);
    endpoints.push_back(AddMember(*session.room, device, label, true));
    session.member = endpoints.front().member;
    MemberInfo& info = members_[session.member];
    info.engine = session.port;
    engine_ports_[session.member] = session.port;
    auto rank = std::make_shared<EngineRank>();
    rank->member = session.member;
    rank->coordinates = identity.coordinates;
    rank->label = label;
    rank->process = identity.process;
    rank->device = device;
    rank->params = std::move(params);
    rank->num_stages = NumStages(rank->params);
    rank->staged_bytes = StagedBytes(rank->params);
    rank->traced = std::move(trace);
    rank->held_version = identity.held_version;
    rank->dirty = identity.dirty;
    WEIGHTD_RETURN_IF_ERROR(
        session.room->model.SetEngine(*session.replica, model, std::move(rank)));
    if (model.traced) session.replica->loader = kTracedOrigin;
    for (const std::string& writer : TrainerDevices(*session.room)) {
      if (info.lent.contains(writer) || !StoresDirectly(writer, device)) continue;
      endpoints.push_back(Announce(session.member, info, writer));
    }
    if (identity.spawns_worker) OfferWorker(session.port, label, identity.process, device);
    Observe(*session.room, *session.replica);
    const bool catches_up = MaybeCatchUp(*session.room, session.replica);
    if (!catches_up && session.replica->complete()) {
      TellIdle(*session.room, ViewOf(session.replica));
    }
  }
  Failpoint("registered");
  return endpoints;
}

void Coordinator::LeaveEngine(EngineSession& session, const Status& cause) {
  const std::lock_guard lock(mu_);
  if (session.room == nullptr) return;
  const EngineCoordinates& at = session.identity.coordinates;
  const std::string label = fmt::format("engine {} dp {} pp {} tp {}", session.identity.engine,
                                        at.dp_rank, at.pp_rank, at.tp_rank);
  Event event;
  event.kind = Event::Kind::kEngineLost;
  event.member = session.member;
  event.status =
      WithPeer(Error(StatusCode::kUnavailable, reason::kPeerLost, "start the engine again",
                     "an engine rank is gone: {} ({}): {}", label, session.identity.process,
                     cause.ok() ? "it closed its session" : Message(cause)),
               label);
  Post(*session.room, event);
  if (session.member != MemberId::kNone) RemoveMember(session.member);
  spawned_.Withdraw(session.port.get());
  session.room->model.LeaveReplica(session.replica, {at.pp_rank, at.tp_rank},
                                   cause.ok() ? absl::OkStatus() : event.status);
  const auto& replicas = session.room->model.replicas();
  if (std::find(replicas.begin(), replicas.end(), session.replica) != replicas.end()) {
    Observe(*session.room, *session.replica);
  } else {
    observer_.OnReplicaLeft(session.room->model.name(), session.replica->engine,
                            session.replica->dp_rank);
  }
  session.room = nullptr;
  --sessions_;
}

bool Coordinator::IsOwnDevice(const std::string& device) const {
  const auto& own = config_.devices;
  return std::find(own.begin(), own.end(), device) != own.end();
}

Status Coordinator::CheckDevice(const std::string& device, const std::string& label,
                                bool spawns) const {
  if (IsOwnDevice(device) || spawned_.Serves(device)) return absl::OkStatus();
  if (spawns && IsDevice(device)) return WithRank(CheckServed(device), label);
  std::vector<std::string> served = config_.devices;
  for (const SpawnedWorkers::View& worker : spawned_.Views()) served.push_back(worker.device);
  return WithRank(Error(StatusCode::kInvalidArgument, reason::kUnknownDevice,
                        "pass the device that holds the memory, or name it in worker.devices of "
                        "the daemon's configuration, or let the client start the worker itself "
                        "(worker=\"spawn\")",
                        "no worker serves the device: {}; served are {}", device,
                        served.empty() ? "none" : fmt::format("{}", fmt::join(served, ", "))),
                  label);
}

/// The client starts the worker of its device if the daemon has none and no other client does.
void Coordinator::OfferWorker(const std::shared_ptr<OwnerPort>& client, const std::string& label,
                              const std::string& process, const std::string& device) {
  if (!IsOwnDevice(device)) {
    return spawned_.Offer(client, fmt::format("{} ({})", label, process), device);
  }
  spawned_.Withdraw(client.get());
  spdlog::info("a client that would start a worker uses the daemon's: device={} client={}", device,
               label);
}

WorkerEndpoint Coordinator::AddMember(ModelRoom& room, const std::string& device,
                                      const std::string& label, bool writable) {
  const auto member = static_cast<MemberId>(next_member_++);
  MemberInfo& info = members_[member];
  info.token = RandomToken();
  info.label = label;
  info.writable = writable;
  info.device = device;
  info.room = &room;
  return Announce(member, info, device);
}

/// The member lends its memory to this device's worker, which is told if it runs; otherwise both
/// are when it comes up.
WorkerEndpoint Coordinator::Announce(MemberId member, MemberInfo& info, const std::string& device) {
  info.lent.insert(device);
  WorkerEndpoint endpoint{"", info.token, member, device};
  const auto it = workers_.find(device);
  if (it == workers_.end()) return endpoint;
  endpoint.socket_path = it->second->socket_path();
  it->second->SendExpect(member, info.token, info.writable, info.label);
  return endpoint;
}

/// Announces the member to one more worker and tells its client, once.
void Coordinator::LendTo(MemberId member, MemberInfo& info, const std::string& device) {
  if (info.lent.contains(device)) return;
  const WorkerEndpoint endpoint = Announce(member, info, device);
  if (endpoint.socket_path.empty()) return;
  if (auto engine = info.engine.lock()) engine->SendWorkerChanged(endpoint);
}

/// Does the worker of `source` write into memory of `target` by itself?
bool Coordinator::StoresDirectly(const std::string& source, const std::string& target) const {
  const StatusOr<PathChoice> choice = ChoosePath({source}, {target}, ThisBuild(), policy_);
  return choice.ok() && !IsWire(choice->path);
}

/// A trainer rank has its memory on `device`: that device's worker will write into the engines.
void Coordinator::LendToTrainer(ModelRoom& room, const std::string& device) {
  for (auto& [member, info] : members_) {
    if (info.room != &room || !info.writable) continue;
    if (StoresDirectly(device, info.device)) LendTo(member, info, device);
  }
}

std::set<std::string> Coordinator::TrainerDevices(const ModelRoom& room) const {
  std::set<std::string> devices;
  for (const auto& [member, info] : members_) {
    if (info.room == &room && !info.writable) devices.insert(info.device);
  }
  return devices;
}

void Coordinator::RemoveMember(MemberId member) {
  const auto info = members_.extract(member);
  engine_ports_.erase(member);
  if (info.empty()) return;
  const auto tell = [this](const std::string& device, auto&& send) {
    const auto it = workers_.find(device);
    if (it != workers_.end()) send(*it->second);
  };
  for (const std::string& device : info.mapped().lent) {
    tell(device, [member](WorkerPort& worker) { worker.SendForget(member); });
  }
  // Wires hold memory of the devices: those that nobody will use again end now.
  for (const auto& [wire, devices] : info.mapped().room->plans.DropWiresOf(member)) {
    for (const std::string& device : devices) {
      tell(device, [number = wire](WorkerPort& worker) { worker.SendCloseWire(number); });
    }
  }
}

}  // namespace weightd
