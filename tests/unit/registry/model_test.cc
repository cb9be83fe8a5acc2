#include "daemon/registry/model.h"

#include <catch2/catch.hpp>

namespace weightd {
namespace {

std::string Reason(const Status& status) { return status.ok() ? "" : FieldsOf(status).reason; }

void RegisterAll(Model& model, ActorGroup& group) {
  for (int rank = 0; rank < group.world_size; ++rank) {
    auto actor = std::make_shared<ActorRank>();
    actor->rank = rank;
    model.SetActor(group, std::move(actor));
  }
}

std::shared_ptr<const EngineRank> Rank(int tp_rank, int tp_size, uint64_t held, bool dirty) {
  auto rank = std::make_shared<EngineRank>();
  rank->coordinates.tp_rank = tp_rank;
  rank->coordinates.tp_size = tp_size;
  rank->held_version = held;
  rank->dirty = dirty;
  return rank;
}

EngineModel TwoRanks() { return {"LlamaForCausalLM", "vllm-0.32", "{}", "in_place", 2}; }

std::shared_ptr<Replica> JoinBoth(Model& model) {
  EngineCoordinates at{.tp_rank = 0, .tp_size = 2};
  StatusOr<std::shared_ptr<Replica>> replica = model.JoinReplica("e0", at, 2);
  REQUIRE(replica.ok());
  at.tp_rank = 1;
  REQUIRE(model.JoinReplica("e0", at, 2).ok());
  return *replica;
}

TEST_CASE("a second rank 0 and another world size are refused by name") {
  Model model("m", 0);
  REQUIRE(model.JoinGroup("g", 1, 2, 0).ok());
  CHECK(Reason(model.JoinGroup("g", 1, 2, 0).status()) == reason::kDuplicateRank);
  CHECK(Reason(model.JoinGroup("g", 1, 4, 1).status()) == reason::kWorldSize);
  CHECK(Reason(model.JoinGroup("g", 1, 2, 2).status()) == reason::kWorldSize);
  CHECK(model.JoinGroup("g", 1, 2, 1).ok());
}

TEST_CASE("a newer group supersedes an older one once it is complete, not before") {
  Model model("m", 0);
  auto old_group = *model.JoinGroup("old", 1, 1, 0);
  RegisterAll(model, *old_group);
  auto new_group = *model.JoinGroup("new", 2, 1, 0);
  CHECK(model.CurrentGroup() == old_group);
  CHECK_FALSE(old_group->superseded);
  RegisterAll(model, *new_group);
  CHECK(old_group->superseded);
  CHECK(model.CurrentGroup() == new_group);
  CHECK(Reason(model.JoinGroup("older", 1, 1, 0).status()) == reason::kFenced);
}

TEST_CASE("who left and came back under the same name is told apart from before") {
  Model model("m", 0);
  auto group = *model.JoinGroup("g", 1, 1, 0);
  RegisterAll(model, *group);
  const uint64_t group_before = group->generation;
  model.LeaveGroup(group, 0);
  auto group_again = *model.JoinGroup("g", 1, 1, 0);
  RegisterAll(model, *group_again);
  CHECK(group_again != group);
  CHECK(group_again->generation != group_before);

  const EngineModel one{"LlamaForCausalLM", "vllm-0.32", "{}", "in_place", 1};
  auto replica = *model.JoinReplica("e0", {}, 1);
  REQUIRE(model.SetEngine(*replica, one, Rank(0, 1, 0, false)).ok());
  const uint64_t replica_before = replica->generation;
  model.LeaveReplica(replica, {0, 0}, absl::OkStatus());
  auto replica_again = *model.JoinReplica("e0", {}, 1);
  REQUIRE(model.SetEngine(*replica_again, one, Rank(0, 1, 0, false)).ok());
  CHECK(replica_again != replica);
  CHECK(replica_again->generation != replica_before);
}

TEST_CASE("a rank that left is known as lost until it comes back") {
  Model model("m", 0);
  auto group = *model.JoinGroup("g", 1, 2, 0);
  REQUIRE(model.JoinGroup("g", 1, 2, 1).ok());
  RegisterAll(model, *group);
  model.LeaveGroup(group, 1);
  CHECK(group->lost[1]);
  CHECK_FALSE(group->complete());
  REQUIRE(model.JoinGroup("g", 1, 2, 1).ok());
  auto actor = std::make_shared<ActorRank>();
  actor->rank = 1;
  model.SetActor(*group, std::move(actor));
  CHECK_FALSE(group->lost[1]);
  CHECK(group->complete());
}

TEST_CASE("what the ranks hold decides what a complete replica is") {
  struct Case {
    uint64_t held0, held1;
    bool dirty1;
    ReplicaState state;
    uint64_t version;
  };
  const Case cases[] = {{0, 0, false, ReplicaState::kRegistered, 0},
                        {7, 7, false, ReplicaState::kServing, 7},
                        {7, 6, false, ReplicaState::kRegistered, 0},
                        {7, 7, true, ReplicaState::kPoisoned, 0}};
  for (const Case& c : cases) {
    Model model("m", 0);
    auto replica = JoinBoth(model);
    REQUIRE(model.SetEngine(*replica, TwoRanks(), Rank(0, 2, c.held0, false)).ok());
    CHECK(replica->state == ReplicaState::kGone);
    REQUIRE(model.SetEngine(*replica, TwoRanks(), Rank(1, 2, c.held1, c.dirty1)).ok());
    CHECK(replica->state == c.state);
    CHECK(replica->version == c.version);
    CHECK(model.ledger().highest() == c.version);
  }
}

TEST_CASE("a replica without one of its ranks is gone and holds nothing") {
  Model model("m", 0);
  auto replica = JoinBoth(model);
  REQUIRE(model.SetEngine(*replica, TwoRanks(), Rank(0, 2, 3, false)).ok());
  REQUIRE(model.SetEngine(*replica, TwoRanks(), Rank(1, 2, 3, false)).ok());
  REQUIRE(IsReady(replica->state));
  const Status cause = Error(StatusCode::kUnavailable, reason::kPeerLost, "", "killed");
  model.LeaveReplica(replica, {0, 1}, cause);
  CHECK(replica->state == ReplicaState::kGone);
  CHECK(replica->version == 0);
  CHECK(Message(replica->error) == "killed");
}

TEST_CASE("who leaves in order and comes back under its name does not look as before") {
  Model model("m", 0);
  auto replica = JoinBoth(model);
  REQUIRE(model.SetEngine(*replica, TwoRanks(), Rank(0, 2, 3, false)).ok());
  REQUIRE(model.SetEngine(*replica, TwoRanks(), Rank(1, 2, 3, false)).ok());
  const uint64_t before = replica->generation;
  model.LeaveReplica(replica, {0, 0}, absl::OkStatus());
  model.LeaveReplica(replica, {0, 1}, absl::OkStatus());
  REQUIRE(model.replicas().empty());
  auto again = JoinBoth(model);
  REQUIRE(model.SetEngine(*again, TwoRanks(), Rank(0, 2, 3, false)).ok());
  REQUIRE(model.SetEngine(*again, TwoRanks(), Rank(1, 2, 3, false)).ok());
  CHECK(again->generation != before);

  auto group = *model.JoinGroup("g", 1, 2, 0);
  REQUIRE(model.JoinGroup("g", 1, 2, 1).ok());
  RegisterAll(model, *group);
  const uint64_t group_before = group->generation;
  model.LeaveGroup(group, 0);
  model.LeaveGroup(group, 1);
  REQUIRE(model.groups().empty());
  auto group_again = *model.JoinGroup("g", 1, 2, 0);
  REQUIRE(model.JoinGroup("g", 1, 2, 1).ok());
  RegisterAll(model, *group_again);
  CHECK(group_again->generation != group_before);
}

TEST_CASE("ranks of one engine that disagree about the model are refused") {
  Model model("m", 0);
  auto replica = JoinBoth(model);
  REQUIRE(model.SetEngine(*replica, TwoRanks(), Rank(0, 2, 0, false)).ok());
  EngineModel other = TwoRanks();
  other.architecture = "Qwen2ForCausalLM";
  CHECK(Reason(model.SetEngine(*replica, other, Rank(1, 2, 0, false))) == reason::kConfig);
}

TEST_CASE("either all ranks of an engine are traced, or none") {
  Model model("m", 0);
  auto replica = JoinBoth(model);
  EngineModel traced = TwoRanks();
  traced.traced = true;
  REQUIRE(model.SetEngine(*replica, TwoRanks(), Rank(0, 2, 0, false)).ok());
  CHECK(Reason(model.SetEngine(*replica, traced, Rank(1, 2, 0, false))) == reason::kConfig);
  REQUIRE(model.SetEngine(*replica, traced, Rank(0, 2, 0, false)).ok());
  CHECK(model.SetEngine(*replica, traced, Rank(1, 2, 0, false)).ok());
}

}  // namespace
}  // namespace weightd
