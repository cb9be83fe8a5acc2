#include <catch2/catch.hpp>

#include "tests/unit/plan/plan_testing.h"

namespace weightd {
namespace {

using testing::FaultOf;
using testing::MakeBox;
using testing::Shard;
using testing::StraightWrite;
using testing::Trainer;
using testing::ZeroFill;

/// Two layers, listed in the wrong order, of a trainer of two ranks.
struct TwoLayers {
  Trainer trainer{2};
  RankLayout layout;

  TwoLayers() {
    for (const char* name : {"layers.1.w", "layers.0.w"}) {
      const uint32_t tensor = trainer.Add(name, {4, 8}, {2}, {Shard(0)});
      layout.params.push_back({name, {4, 8}, DType::kFloat32});
      layout.writes.push_back(
          StraightWrite(tensor, tensor, testing::MakeBox({0, 0}, {4, 8}), MakeBox({0, 0}, {4, 8})));
    }
  }

  RankPlan Plan(const WindowLimits& limits) const {
    const auto grid = trainer.Grid();
    REQUIRE(grid.ok());
    return EnumerateRank(trainer.table(), *grid, layout, limits);
  }
  std::string Fault(const RankPlan& plan, const WindowLimits& limits) const {
    return FaultOf(trainer.table(), trainer.shards(), layout, plan, limits);
  }
};

TEST_CASE("copies come in layer order") {
  const TwoLayers two;
  const RankPlan plan = two.Plan({});
  REQUIRE(plan.copies.size() == 4);
  CHECK(plan.copies[0] == Copy{1, 0, 0, MakeBox({0, 0}, {2, 8}), MakeBox({0, 0}, {2, 8})});
  CHECK(plan.copies[1] == Copy{1, 1, 0, MakeBox({2, 0}, {2, 8}), MakeBox({2, 0}, {2, 8})});
  CHECK(plan.copies[2].write == 0);
  CHECK(plan.bytes == 2 * 4 * 8 * 4);
  CHECK(plan.windows.size() == 1);
}

TEST_CASE("windows are cut by operations") {
  const TwoLayers two;
  const WindowLimits limits = {.bytes = 1 << 20, .operations = 3};
  const RankPlan plan = two.Plan(limits);
  REQUIRE(plan.windows.size() == 2);
  CHECK(plan.windows[0].end == 3);
  CHECK(plan.windows[1].bytes == 64);
  CHECK(two.Fault(plan, limits).empty());
}

TEST_CASE("windows are cut by bytes, and a copy that exceeds them is split") {
  const TwoLayers two;
  const auto bytes = GENERATE(1024, 128, 64, 40, 32, 20, 4, 1);
  const WindowLimits limits = {.bytes = static_cast<uint64_t>(bytes), .operations = 1024};
  const RankPlan plan = two.Plan(limits);
  CHECK(two.Fault(plan, limits).empty());
  CHECK(plan.bytes == 256);
  if (bytes == 64) CHECK(plan.windows.size() == 4);
  if (bytes == 4) CHECK(plan.copies.size() == 64);
}

TEST_CASE("zero fill is split like any other copy") {
  RankLayout layout;
  layout.params.push_back({"w", {4, 8}, DType::kFloat16});
  layout.writes.push_back(ZeroFill(0, MakeBox({0, 0}, {4, 8})));
  const Trainer trainer(1);
  const WindowLimits limits = {.bytes = 24, .operations = 10};
  const RankPlan plan = EnumerateRank(trainer.table(), *trainer.Grid(), layout, limits);
  CHECK(FaultOf(trainer.table(), trainer.shards(), layout, plan, limits).empty());
  CHECK(plan.copies.size() == 4);
}

TEST_CASE("a transposed write lands by target offset") {
  Trainer trainer(2);
  trainer.Add("w", {4, 6}, {2}, {Shard(1)});
  RankLayout layout;
  layout.params.push_back({"w", {6, 4}, DType::kFloat32});
  layout.writes.push_back({0, 0, false, {1, 0}, MakeBox({0, 0}, {4, 6}), MakeBox({0, 0}, {6, 4})});
  REQUIRE(CheckCoverage(trainer.table(), layout).ok());
  const RankPlan plan = EnumerateRank(trainer.table(), *trainer.Grid(), layout, {});
  REQUIRE(plan.copies.size() == 2);
  CHECK(plan.copies[1] == Copy{0, 1, 0, MakeBox({0, 3}, {4, 3}), MakeBox({3, 0}, {3, 4})});
  CHECK(FaultOf(trainer.table(), trainer.shards(), layout, plan, {}).empty());
}

TEST_CASE("a list of copies gives back what was put in") {
  CopyList list;
  CHECK(list.empty());
  const Copy scalar = {1, 2, 3, Box(), Box()};
  const Copy stacked = {4, 5, 6, MakeBox({1, 2, 3}, {1, 5, 6}), MakeBox({7, 8}, {5, 6})};
  list.push_back(scalar);
  list.push_back(stacked);
  CHECK(list.size() == 2);
  CHECK(list[0] == scalar);
  CHECK(list[1] == stacked);
  CHECK(std::vector<Copy>(list.begin(), list.end()) == std::vector<Copy>{scalar, stacked});
}

}  // namespace
}  // namespace weightd
