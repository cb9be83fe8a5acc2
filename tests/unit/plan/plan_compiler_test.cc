#include "daemon/plan/plan_compiler.h"

#include <catch2/catch.hpp>

#include "tests/unit/plan/plan_testing.h"

namespace weightd {
namespace {

using testing::MakeBox;
using testing::ReasonOf;
using testing::Replicate;
using testing::Shard;
using testing::StraightWrite;
using testing::Trainer;
using testing::ZeroFill;

/// Two trainers; a column-parallel tensor, a norm and a tensor that is skipped; tensor parallel 2.
Trainer MakeTrainer() {
  Trainer trainer(2);
  trainer.Add("w", {8, 4}, {2}, {Shard(0)});
  trainer.Add("norm", {4}, {2}, {Replicate()});
  trainer.Add("cache", {4}, {2}, {Shard(0)});
  return trainer;
}

const std::vector<uint32_t> kSkipped = {2};

StatusOr<RankLayout> LayoutOf(size_t rank) {
  RankLayout layout;
  const auto row = static_cast<int64_t>(rank) * 4;
  layout.params.push_back({"w", {5, 4}, DType::kBFloat16});
  layout.params.push_back({"norm", {4}, DType::kFloat32});
  layout.writes = {StraightWrite(0, 0, MakeBox({row, 0}, {4, 4}), MakeBox({0, 0}, {4, 4})),
                   ZeroFill(0, MakeBox({4, 0}, {1, 4})),
                   StraightWrite(1, 1, MakeBox({0}, {4}), MakeBox({0}, {4}))};
  return layout;
}

TEST_CASE("a compiled plan adds up what every rank sends and receives") {
  const Trainer trainer = MakeTrainer();
  const auto plan = CompilePlan(trainer.table(), trainer.shards(), LayoutOf, 2, kSkipped, {});
  REQUIRE(plan.ok());
  REQUIRE(plan->ranks.size() == 2);
  CHECK(plan->ranks[0].bytes == 4 * 4 * 2 + 4 * 2 + 4 * 4);
  CHECK(plan->ranks[0].zero_fill_bytes == 8);
  CHECK(plan->ranks[0].boxes == 3);
  CHECK(plan->ranks[0].windows == 1);
  CHECK(plan->bytes == 2 * plan->ranks[0].bytes);
  CHECK(plan->boxes == 6);
  CHECK(plan->windows == 2);
  CHECK(plan->pair(1, 1).boxes == 1);
  CHECK(plan->pair(1, 1).bytes == 32);
  CHECK(plan->pair(0, 0).bytes == 32 + 16);
  CHECK(plan->pair(0, 1).bytes == 16);
  CHECK(plan->pair(1, 0).boxes == 0);
}

TEST_CASE("kept layouts and layouts on demand give the same plan") {
  const Trainer trainer = MakeTrainer();
  const RankLayout first = *LayoutOf(0);
  const RankLayout second = *LayoutOf(1);
  const std::vector<const RankLayout*> replica = {&first, &second};
  const auto kept = CompilePlan(trainer.table(), trainer.shards(), replica, kSkipped, {});
  const auto demanded = CompilePlan(trainer.table(), trainer.shards(), LayoutOf, 2, kSkipped, {});
  REQUIRE(kept.ok());
  REQUIRE(demanded.ok());
  CHECK(kept->digest == demanded->digest);
  CHECK(kept->digest == PlanDigest(trainer.table(), trainer.shards(), replica, {}));
  CHECK(kept->bytes == demanded->bytes);
}

TEST_CASE("a plan that is not proven is refused") {
  Trainer trainer = MakeTrainer();
  const auto compile = [&](const LayoutFn& layout_of, std::span<const uint32_t> skipped) {
    return ReasonOf(
        CompilePlan(trainer.table(), trainer.shards(), layout_of, 2, skipped, {}).status());
  };
  SECTION("sources") {
    trainer.shards()[1].boxes[0].extent[0] = 3;
    CHECK(compile(LayoutOf, kSkipped) == reason::kGap);
  }
  SECTION("an engine rank") {
    const auto broken = [](size_t rank) {
      StatusOr<RankLayout> layout = LayoutOf(rank);
      if (rank == 1) layout->writes.pop_back();
      return layout;
    };
    CHECK(compile(broken, kSkipped) == reason::kUncoveredParameter);
    const auto plan = CompilePlan(trainer.table(), trainer.shards(), broken, 2, kSkipped, {});
    CHECK(FieldsOf(plan.status()).rank == "engine rank 1");
    CHECK(FieldsOf(plan.status()).tensor == "norm");
  }
  SECTION("a source that nobody reads") { CHECK(compile(LayoutOf, {}) == reason::kUnknownTensor); }
  SECTION("a layout that cannot be made") {
    const auto failing = [](size_t) -> StatusOr<RankLayout> {
      return Error(StatusCode::kInvalidArgument, reason::kDivisibility, "", "no layout");
    };
    CHECK(compile(failing, kSkipped) == reason::kDivisibility);
  }
}

}  // namespace
}  // namespace weightd
