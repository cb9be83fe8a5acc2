#include "daemon/registry/model.h"

#include <algorithm>

namespace weightd {

int ActorGroup::registered() const {
  return static_cast<int>(
      std::count_if(ranks.begin(), ranks.end(), [](const auto& rank) { return rank != nullptr; }));
}

Status Replica::Apply(ReplicaEvent event) {
  WEIGHTD_ASSIGN_OR_RETURN(const ReplicaState next, Next(state, event, before));
  if (event == ReplicaEvent::kPrepare || event == ReplicaEvent::kCatchUp) before = state;
  state = next;
  return absl::OkStatus();
}

StatusOr<std::shared_ptr<ActorGroup>> Model::JoinGroup(const std::string& id, uint64_t order,
                                                       int world_size, int rank) {
  if (world_size < 1 || rank < 0 || rank >= world_size) {
    return Error(StatusCode::kInvalidArgument, reason::kWorldSize,
                 "pass the rank and world size of the trainer's process group",
                 "rank is not below world size: rank={} world_size={}", rank, world_size);
  }
  for (const auto& group : groups_) {
    if (group->id != id && group->complete() && group->order > order) {
      return Error(StatusCode::kAborted, reason::kFenced,
                   "stop this trainer, or start it again to take over",
                   "a newer trainer has taken over this model: group={} newer={}", id, group->id);
    }
  }
  auto it = std::find_if(groups_.begin(), groups_.end(),
                         [&id](const auto& group) { return group->id == id; });
  if (it == groups_.end()) {
    auto group = std::make_shared<ActorGroup>();
    group->id = id;
    group->order = order;
    group->world_size = world_size;
    group->ranks.resize(static_cast<size_t>(world_size));
    group->joined.resize(static_cast<size_t>(world_size));
    group->lost.resize(static_cast<size_t>(world_size));
    it = groups_.insert(groups_.end(), std::move(group));
  }
  ActorGroup& group = **it;
  if (group.superseded) {
    return Error(StatusCode::kAborted, reason::kFenced,
                 "stop this trainer, or start it again to take over",
                 "a newer trainer has taken over this model: group={}", id);
  }
  if (group.world_size != world_size) {
    return Error(StatusCode::kInvalidArgument, reason::kWorldSize,
                 "start every rank with the same world size",
                 "ranks of one group disagree on world size: group={} rank={} says={} others={}",
                 id, rank, world_size, group.world_size);
  }
  if (group.joined[static_cast<size_t>(rank)]) {
    return Error(StatusCode::kAlreadyExists, reason::kDuplicateRank,
                 "give every process its own rank, or wait until the old one has exited",
                 "a live process has this rank: group={} rank={}", id, rank);
  }
  group.joined[static_cast<size_t>(rank)] = true;
  return *it;
}

void Model::SetActor(ActorGroup& group, std::shared_ptr<const ActorRank> rank) {
  const auto index = static_cast<size_t>(rank->rank);
  group.ranks[index] = std::move(rank);
  group.lost[index] = false;
  group.generation = NextGeneration();
  if (!group.complete()) return;
  for (const auto& other : groups_) {
    if (other.get() != &group && other->order <= group.order) other->superseded = true;
  }
}

void Model::LeaveGroup(const std::shared_ptr<ActorGroup>& group, int rank) {
  const auto index = static_cast<size_t>(rank);
  group->lost[index] = group->ranks[index] != nullptr;
  group->ranks[index] = nullptr;
  group->joined[index] = false;
  group->generation = NextGeneration();
  const bool anyone =
      std::find(group->joined.begin(), group->joined.end(), true) != group->joined.end();
  if (!anyone) std::erase(groups_, group);
}

StatusOr<std::shared_ptr<Replica>> Model::JoinReplica(const std::string& engine,
                                                      const EngineCoordinates& coordinates,
                                                      int num_ranks) {
  const std::pair key(coordinates.pp_rank, coordinates.tp_rank);
  auto it = std::find_if(replicas_.begin(), replicas_.end(), [&](const auto& replica) {
    return replica->engine == engine && replica->dp_rank == coordinates.dp_rank;
  });
  if (it == replicas_.end()) {
    auto replica = std::make_shared<Replica>();
    replica->engine = engine;
    replica->dp_rank = coordinates.dp_rank;
    it = replicas_.insert(replicas_.end(), std::move(replica));
  }
  Replica& replica = **it;
  if (replica.joined[key]) {
    return Error(StatusCode::kAlreadyExists, reason::kDuplicateRank,
                 "give every engine its own name, or wait until the old process has exited",
                 "a live process has these coordinates: engine={} dp={} pp={} tp={}", engine,
                 coordinates.dp_rank, coordinates.pp_rank, coordinates.tp_rank);
  }
  if (replica.ranks.empty()) replica.model.num_ranks = std::max(1, num_ranks);
  replica.joined[key] = true;
  return *it;
}

Status Model::SetEngine(Replica& replica, const EngineModel& model,
                        std::shared_ptr<const EngineRank> rank) {
  const EngineModel& known = replica.model;
  if (!replica.ranks.empty() &&
      (known.architecture != model.architecture || known.profile != model.profile ||
       known.num_ranks != model.num_ranks)) {
    return Error(StatusCode::kInvalidArgument, reason::kConfig,
                 "start all ranks of an engine from the same model",
                 "ranks of one engine disagree: {} says {} {} with {} ranks, others {} {} with {}",
                 rank->label, model.architecture, model.profile, model.num_ranks,
                 known.architecture, known.profile, known.num_ranks);
  }
  const std::pair key(rank->coordinates.pp_rank, rank->coordinates.tp_rank);
  const bool only = replica.ranks.size() == 1 && replica.ranks.contains(key);
  if (!replica.ranks.empty() && !only && known.traced != model.traced) {
    return Error(StatusCode::kInvalidArgument, reason::kConfig,
                 "give every rank of the engine a trace, or none",
                 "ranks of one engine disagree: {} is {}, others are {}", rank->label,
                 model.traced ? "traced" : "not traced", known.traced ? "traced" : "not");
  }
  replica.model = model;
  replica.ranks[key] = std::move(rank);
  replica.generation = NextGeneration();
  if (replica.complete()) Settle(replica);
  return absl::OkStatus();
}

void Model::Settle(Replica& replica) {
  bool dirty = false;
  bool same = true;
  const uint64_t version = replica.ranks.begin()->second->held_version;
  for (const auto& [key, rank] : replica.ranks) {
    dirty = dirty || rank->dirty;
    same = same && rank->held_version == version && version > 0;
  }
  replica.state = ReplicaState::kGone;
  replica.version = same && !dirty ? version : 0;
  replica.error = absl::OkStatus();
  if (replica.version > 0) ledger_.Observe(replica.version);
  const ReplicaEvent event = dirty                 ? ReplicaEvent::kCompleteDirty
                             : version > 0 && same ? ReplicaEvent::kCompleteClean
                                                   : ReplicaEvent::kCompleteEmpty;
  if (dirty) {
    replica.error = Error(
        StatusCode::kFailedPrecondition, reason::kPeerLost, "sync again: a full sync heals it",
        "an attempt was cut short while it may have written: {}", replica.label());
  }
  WEIGHTD_CHECK(replica.Apply(event).ok());
}

void Model::LeaveReplica(const std::shared_ptr<Replica>& replica, std::pair<int, int> coordinates,
                         const Status& cause) {
  replica->joined.erase(coordinates);
  if (replica->ranks.erase(coordinates) > 0) {
    replica->error = cause;
    replica->version = 0;
    replica->generation = NextGeneration();
    WEIGHTD_CHECK(replica->Apply(ReplicaEvent::kRankLost).ok());
  }
  if (replica->joined.empty() && cause.ok()) std::erase(replicas_, replica);
}

std::shared_ptr<ActorGroup> Model::CurrentGroup() const {
  std::shared_ptr<ActorGroup> best;
  for (const auto& group : groups_) {
    if (group->superseded) continue;
    const bool better = best == nullptr || (group->complete() && !best->complete()) ||
                        (group->complete() == best->complete() && group->order > best->order);
    if (better) best = group;
  }
  return best;
}

}  // namespace weightd
