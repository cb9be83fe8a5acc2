// The coordinator's dealings with clients: joining, registering, leaving.
#include <random>
#include <unordered_set>

#include "daemon/base/failpoint.h"
#include "daemon/base/log.h"
#include "daemon/sync/room_host.h"

namespace weightd {
namespace {

std::string RandomToken() {
  std::random_device device;
  return fmt::format("{:08x}{:08x}{:08x}{:08x}", device(), device(), device(), device());
}

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

StatusOr<std::shared_ptr<ActorSession>> Coordinator::JoinActor(const ActorIdentity& identity,
                                                               std::shared_ptr<ActorPort> port) {
  const std::lock_guard lock(mu_);
  if (draining_) {
    return Error(StatusCode::kUnavailable, reason::kDraining, "connect again after its restart",
                 "the daemon is shutting down");
  }
  ModelRoom& room = RoomFor(identity.model);
  auto session = std::make_shared<ActorSession>();
  WEIGHTD_ASSIGN_OR_RETURN(session->group,
                           room.model.JoinGroup(identity.group, identity.group_order,
                                                identity.world_size, identity.rank));
  session->identity = identity;
  session->port = std::move(port);
  session->room = &room;
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
  if (table->size() > config_.max_tensors) {
    return Error(StatusCode::kResourceExhausted, reason::kMessageTooLarge,
                 "raise limits.max_tensors in the daemon's configuration",
                 "too many tensors: {} registers {}, the limit is {}", label, table->size(),
                 config_.max_tensors);
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
                                                    const std::string& digest,
                                                    std::optional<TensorTable> table,
                                                    RankShards shards) {
  WorkerEndpoint endpoint;
  std::string label;
  {
    const std::lock_guard lock(mu_);
    ActorGroup& group = *session.group;
    label = fmt::format("actor {}", session.identity.rank);
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
    endpoint = AddMember(*session.room, label, false);
    session.member = endpoint.member;
    members_[session.member].actor = session.port;
    auto rank = std::make_shared<ActorRank>();
    rank->member = session.member;
    rank->rank = session.identity.rank;
    rank->label = label;
    rank->process = session.identity.process;
    rank->shards = std::move(shards);
    session.room->model.SetActor(group, std::move(rank));
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
  session.room->model.LeaveGroup(session.group, session.identity.rank);
  session.room = nullptr;
}

StatusOr<std::shared_ptr<EngineSession>> Coordinator::JoinEngine(const EngineIdentity& identity,
                                                                 std::shared_ptr<EnginePort> port) {
  const std::lock_guard lock(mu_);
  if (draining_) {
    return Error(StatusCode::kUnavailable, reason::kDraining, "connect again after its restart",
                 "the daemon is shutting down");
  }
  ModelRoom& room = RoomFor(identity.model);
  auto session = std::make_shared<EngineSession>();
  WEIGHTD_ASSIGN_OR_RETURN(
      session->replica,
      room.model.JoinReplica(identity.engine, identity.coordinates, identity.num_ranks));
  session->identity = identity;
  session->port = std::move(port);
  session->room = &room;
  return session;
}

StatusOr<WorkerEndpoint> Coordinator::RegisterEngine(EngineSession& session, EngineModel model,
                                                     std::vector<ParamInfo> params,
                                                     std::shared_ptr<const TracedLayout> trace,
                                                     bool prefer_trace) {
  const auto loader = loaders_->Find(model.architecture, model.profile);
  model.traced = trace != nullptr && (prefer_trace || !loader.ok());
  if (!model.traced) {
    WEIGHTD_RETURN_IF_ERROR(loader.status());
    trace = nullptr;
  }
  WEIGHTD_RETURN_IF_ERROR(CheckUnique(params, "parameter"));
  if (!model.commit_mode.empty() && model.commit_mode != "in_place") {
    return Error(StatusCode::kInvalidArgument, reason::kConfig, "use commit_mode \"in_place\"",
                 "commit mode is not supported: {}", model.commit_mode);
  }
  WorkerEndpoint endpoint;
  {
    const std::lock_guard lock(mu_);
    const EngineIdentity& identity = session.identity;
    if (session.member != MemberId::kNone) RemoveMember(session.member);
    const std::string label =
        fmt::format("engine {} dp {} pp {} tp {}", identity.engine, identity.coordinates.dp_rank,
                    identity.coordinates.pp_rank, identity.coordinates.tp_rank);
    endpoint = AddMember(*session.room, label, true);
    session.member = endpoint.member;
    members_[session.member].engine = session.port;
    engine_ports_[session.member] = session.port;
    auto rank = std::make_shared<EngineRank>();
    rank->member = session.member;
    rank->coordinates = identity.coordinates;
    rank->label = label;
    rank->process = identity.process;
    rank->params = std::move(params);
    rank->traced = std::move(trace);
    rank->held_version = identity.held_version;
    rank->dirty = identity.dirty;
    WEIGHTD_RETURN_IF_ERROR(
        session.room->model.SetEngine(*session.replica, model, std::move(rank)));
    session.replica->loader = model.traced ? kTracedOrigin : (*loader)->origin();
    Observe(*session.room, *session.replica);
    const bool catches_up = MaybeCatchUp(*session.room, session.replica);
    if (!catches_up && session.replica->complete()) TellIdle(ViewOf(session.replica));
  }
  Failpoint("registered");
  return endpoint;
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
  session.room->model.LeaveReplica(session.replica, {at.pp_rank, at.tp_rank},
                                   cause.ok() ? absl::OkStatus() : event.status);
  Observe(*session.room, *session.replica);
  session.room = nullptr;
}

WorkerEndpoint Coordinator::AddMember(ModelRoom& room, const std::string& label, bool writable) {
  WorkerEndpoint endpoint;
  endpoint.member = static_cast<MemberId>(next_member_++);
  endpoint.token = RandomToken();
  MemberInfo& info = members_[endpoint.member];
  info.token = endpoint.token;
  info.label = label;
  info.writable = writable;
  info.room = &room;
  if (worker_ != nullptr) {
    endpoint.socket_path = worker_->socket_path();
    endpoint.device = worker_->device();
    worker_->SendExpect(endpoint.member, endpoint.token, writable, label);
  }
  return endpoint;
}

void Coordinator::RemoveMember(MemberId member) {
  members_.erase(member);
  engine_ports_.erase(member);
  if (worker_ != nullptr) worker_->SendForget(member);
}

}  // namespace weightd
