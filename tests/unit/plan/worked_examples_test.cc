// The worked examples of how trainers cut tensors and engines read them, with their numbers written
// out: uneven chunks, empty ranks, strided shards, grouped-query attention.
#include <catch2/catch.hpp>

#include "tests/unit/plan/plan_testing.h"

namespace weightd {
namespace {

using testing::MakeBox;
using testing::Shard;
using testing::ShardOf;
using testing::StraightWrite;
using testing::StridedShard;
using testing::Trainer;
using testing::ZeroFill;

constexpr WindowLimits kLimits;

Box Rows(int64_t begin, int64_t end, int64_t columns) {
  return MakeBox({begin, 0}, {end - begin, columns});
}

TEST_CASE("a trainer rank that straddles an engine border serves both engine ranks") {
  Trainer trainer(8);
  trainer.Add("wte", {50257, 4}, {8}, {Shard(0)});
  const auto grid = trainer.Grid();
  REQUIRE(grid.ok());
  RankLayout first;
  first.params.push_back({"wte", {25152, 4}, DType::kBFloat16});
  first.writes.push_back(StraightWrite(0, 0, Rows(0, 25152, 4), Rows(0, 25152, 4)));
  RankLayout second = first;
  second.writes = {StraightWrite(0, 0, Rows(25152, 50257, 4), Rows(0, 25105, 4)),
                   ZeroFill(0, Rows(25105, 25152, 4))};
  REQUIRE(CheckCoverage(trainer.table(), first).ok());
  REQUIRE(CheckCoverage(trainer.table(), second).ok());

  const RankPlan to_first = EnumerateRank(trainer.table(), *grid, first, kLimits);
  const RankPlan to_second = EnumerateRank(trainer.table(), *grid, second, kLimits);
  REQUIRE(to_first.copies.size() == 5);
  CHECK(to_first.copies[4] == Copy{0, 4, 0, Rows(25132, 25152, 4), Rows(25132, 25152, 4)});
  REQUIRE(to_second.copies.size() == 5);
  CHECK(to_second.copies[0] == Copy{0, 4, 0, Rows(25152, 31415, 4), Rows(0, 6263, 4)});
  CHECK(to_second.copies[3] == Copy{0, 7, 0, Rows(43981, 50257, 4), Rows(18829, 25105, 4)});
  CHECK(to_second.copies[4] == Copy{1, 0, 0, Box(), Rows(25105, 25152, 4)});
  CHECK(to_second.bytes == 25152 * 4 * 2);
}

TEST_CASE("trailing ranks may be empty") {
  struct Example {
    int64_t rows;
    int ranks;
    std::vector<int64_t> held;
  };
  const auto example = GENERATE(values<Example>(
      {{10, 4, {3, 3, 3, 1}}, {9, 4, {3, 3, 3, 0}}, {5, 8, {1, 1, 1, 1, 1, 0, 0, 0}}}));
  Trainer trainer(example.ranks);
  trainer.Add("w", {example.rows, 2}, {example.ranks}, {Shard(0)});
  const auto grid = trainer.Grid();
  REQUIRE(grid.ok());
  std::vector<int64_t> held(example.held.size(), 0);
  grid->ForEachOwner(0, WholeBox({example.rows, 2}), [&](const Box& cell, uint32_t rank, uint32_t) {
    held[rank] += cell.extent[0];
  });
  CHECK(held == example.held);
}

TEST_CASE("experts spread over more ranks than there are experts per chunk leave ranks empty") {
  Trainer trainer(64);
  trainer.Add("experts", {160, 2, 2}, {64}, {Shard(0)});
  const auto grid = trainer.Grid();
  REQUIRE(grid.ok());
  std::vector<int64_t> held(64, 0);
  grid->ForEachOwner(0, WholeBox({160, 2, 2}), [&](const Box& cell, uint32_t rank, uint32_t) {
    held[rank] = cell.extent[0];
  });
  for (size_t rank = 0; rank < 64; ++rank) {
    CHECK(held[rank] == (rank < 53 ? 3 : rank == 53 ? 1 : 0));
  }
}

TEST_CASE("strided shards interleave data parallel pieces with tensor parallel ones") {
  const std::vector<testing::Placement> placements = {StridedShard(0), Shard(0)};
  const std::vector<int64_t> origins = {0, 5504, 1376, 6880, 2752, 8256, 4128, 9632};
  Trainer trainer(8);
  trainer.Add("gate_proj", {11008, 2}, {4, 2}, placements);
  const auto grid = trainer.Grid();
  REQUIRE(grid.ok());
  std::vector<int64_t> found(8, -1);
  grid->ForEachOwner(0, WholeBox({11008, 2}), [&](const Box& cell, uint32_t rank, uint32_t) {
    CHECK(cell.extent[0] == 1376);
    found[rank] = cell.origin[0];
  });
  CHECK(found == origins);
}

TEST_CASE("uneven strided shards follow the physical order of the splits") {
  const std::vector<testing::Placement> placements = {StridedShard(0), Shard(0)};
  CHECK(ShardOf({7}, {2, 2}, placements, 0) == MakeBox({0}, {2}));
  CHECK(ShardOf({7}, {2, 2}, placements, 1) == MakeBox({4}, {2}));
  CHECK(ShardOf({7}, {2, 2}, placements, 2) == MakeBox({2}, {2}));
  CHECK(ShardOf({7}, {2, 2}, placements, 3) == MakeBox({6}, {1}));
  CHECK(ShardOf({10}, {4, 2}, placements, 4) == MakeBox({4}, {1}));
  CHECK(ShardOf({10}, {4, 2}, placements, 5) == MakeBox({9}, {1}));
  CHECK(ShardOf({10}, {4, 2}, placements, 6).empty());
  CHECK(ShardOf({10}, {4, 2}, placements, 7).empty());
  Trainer trainer(8);
  trainer.Add("w", {10}, {4, 2}, placements);
  CHECK(trainer.Grid().ok());
}

/// The merged qkv parameter of one engine rank: 32 query heads, 8 key-value heads of 128 rows.
RankLayout MergedQkv(int tp_rank, int tp_size) {
  const int64_t query = 4096 / tp_size;
  const int64_t groups = std::min(tp_size, 8);
  const int64_t rows = 1024 / groups;
  const int64_t group = tp_rank * groups / tp_size;
  RankLayout layout;
  layout.params.push_back({"layers.0.qkv", {query + 2 * rows, 4}, DType::kBFloat16});
  layout.writes = {
      StraightWrite(0, 0, Rows(query * tp_rank, query * (tp_rank + 1), 4), Rows(0, query, 4)),
      StraightWrite(1, 0, Rows(rows * group, rows * (group + 1), 4), Rows(query, query + rows, 4)),
      StraightWrite(2, 0, Rows(rows * group, rows * (group + 1), 4),
                    Rows(query + rows, query + 2 * rows, 4))};
  return layout;
}

TEST_CASE("grouped-query attention reads the trainers of its own heads") {
  Trainer trainer(8);
  for (const char* name : {"q", "k", "v"}) {
    trainer.Add(name, {std::string(name) == "q" ? 4096 : 1024, 4}, {8}, {Shard(0)});
  }
  const auto grid = trainer.Grid();
  REQUIRE(grid.ok());
  for (int tp_rank = 0; tp_rank < 4; ++tp_rank) {
    const RankLayout layout = MergedQkv(tp_rank, 4);
    REQUIRE(CheckCoverage(trainer.table(), layout).ok());
    const RankPlan plan = EnumerateRank(trainer.table(), *grid, layout, kLimits);
    REQUIRE(plan.copies.size() == 6);
    const std::vector<int64_t> landed = {0, 512, 1024, 1152, 1280, 1408};
    for (uint32_t i = 0; i < 6; ++i) {
      CHECK(plan.copies[i].source_rank == static_cast<uint32_t>(2 * tp_rank) + i % 2);
      CHECK(plan.copies[i].target.origin[0] == landed[i]);
    }
  }
}

TEST_CASE("two engine ranks share key-value heads when there are more ranks than heads") {
  Trainer trainer(8);
  trainer.Add("q", {4096, 4}, {8}, {Shard(0)});
  trainer.Add("k", {1024, 4}, {8}, {Shard(0)});
  trainer.Add("v", {1024, 4}, {8}, {Shard(0)});
  const auto grid = trainer.Grid();
  REQUIRE(grid.ok());
  std::vector<RankLayout> layouts;
  for (int tp_rank = 0; tp_rank < 16; ++tp_rank) layouts.push_back(MergedQkv(tp_rank, 16));
  for (uint32_t tp_rank = 0; tp_rank < 16; ++tp_rank) {
    const RankPlan plan = EnumerateRank(trainer.table(), *grid, layouts[tp_rank], kLimits);
    REQUIRE(plan.copies.size() == 3);
    for (const Copy& copy : plan.copies) CHECK(copy.source_rank == tp_rank / 2);
  }
  std::vector<const RankLayout*> replica;
  for (const RankLayout& layout : layouts) replica.push_back(&layout);
  CHECK(CheckSourcesUsed(trainer.table(), replica, {}).ok());
}

}  // namespace
}  // namespace weightd
