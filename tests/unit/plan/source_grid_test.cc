#include <catch2/catch.hpp>
#include <cstdlib>

#include "tests/unit/plan/plan_testing.h"

namespace weightd {
namespace {

using testing::MakeBox;
using testing::ReasonOf;
using testing::Replicate;
using testing::Shard;
using testing::Trainer;

struct Cell {
  Box box;
  uint32_t rank;
  uint32_t shard;
  bool operator==(const Cell&) const = default;
};

std::vector<Cell> Owners(const SourceGrid& grid, uint32_t tensor, const Box& box) {
  std::vector<Cell> cells;
  grid.ForEachOwner(tensor, box, [&](const Box& cell, uint32_t rank, uint32_t shard) {
    cells.push_back({cell, rank, shard});
  });
  return cells;
}

/// Elements that every rank supplies of all tensors.
std::vector<int64_t> Supplied(const Trainer& trainer, const SourceGrid& grid) {
  std::vector<int64_t> supplied(trainer.shards().size(), 0);
  for (uint32_t t = 0; t < trainer.table().size(); ++t) {
    grid.ForEachOwner(
        t, WholeBox(trainer.table()[t].shape),
        [&](const Box& cell, uint32_t rank, uint32_t) { supplied[rank] += cell.num_elements(); });
  }
  return supplied;
}

TEST_CASE("owners of a box are the shards that it meets") {
  Trainer trainer(4);
  trainer.Add("w", {8, 6}, {4}, {Shard(0)});
  const auto grid = trainer.Grid();
  REQUIRE(grid.ok());
  CHECK(Owners(*grid, 0, MakeBox({1, 2}, {4, 3})) ==
        std::vector<Cell>{{MakeBox({1, 2}, {1, 3}), 0, 0},
                          {MakeBox({2, 2}, {2, 3}), 1, 0},
                          {MakeBox({4, 2}, {1, 3}), 2, 0}});
  CHECK(Owners(*grid, 0, MakeBox({1, 2}, {0, 3})).empty());
}

TEST_CASE("two-dimensional blocks are found by row and column") {
  Trainer trainer(4);
  trainer.Add("w", {8, 6}, {2, 2}, {Shard(0), Shard(1)});
  const auto grid = trainer.Grid();
  REQUIRE(grid.ok());
  CHECK(Owners(*grid, 0, MakeBox({3, 3}, {2, 1})) ==
        std::vector<Cell>{{MakeBox({3, 3}, {1, 1}), 1, 0}, {MakeBox({4, 3}, {1, 1}), 3, 0}});
}

TEST_CASE("boxes that are no grid of cuts are supported") {
  Trainer trainer(3);
  trainer.Add("w", {4, 4}, DType::kFloat32,
              {{MakeBox({0, 0}, {4, 1})},
               {MakeBox({0, 1}, {3, 3}), MakeBox({3, 2}, {1, 2})},
               {MakeBox({3, 1}, {1, 1})}});
  const auto grid = trainer.Grid();
  REQUIRE(grid.ok());
  CHECK(Owners(*grid, 0, MakeBox({3, 0}, {1, 4})) ==
        std::vector<Cell>{{MakeBox({3, 0}, {1, 1}), 0, 0},
                          {MakeBox({3, 1}, {1, 1}), 2, 0},
                          {MakeBox({3, 2}, {1, 2}), 1, 1}});
}

TEST_CASE("scalars and tensors without elements have owners too") {
  Trainer trainer(2);
  trainer.Add("scalar", {}, {2}, {Replicate()});
  trainer.Add("nothing", {0, 4}, {2}, {Shard(0)});
  const auto grid = trainer.Grid();
  REQUIRE(grid.ok());
  CHECK(Owners(*grid, 0, WholeBox({})).size() == 1);
  CHECK(Owners(*grid, 1, WholeBox({0, 4})).empty());
}

TEST_CASE("tensors that are cut alike share one tiling, others do not") {
  Trainer trainer(4);
  for (int i = 0; i < 10; ++i) trainer.Add("a", {8, 6}, {4}, {Shard(0)});
  CHECK(trainer.Grid()->num_tilings() == 1);
  trainer.Add("b", {8, 6}, {2, 2}, {Shard(0), Shard(1)});
  trainer.Add("c", {8, 6}, {4}, {Shard(0)}, DType::kBFloat16);
  trainer.Add("d", {8, 5}, {4}, {Shard(0)});
  CHECK(trainer.Grid()->num_tilings() == 4);
}

TEST_CASE("a gap names tensor and box") {
  Trainer trainer(2);
  trainer.Add("fine", {4, 2}, {2}, {Shard(0)});
  trainer.Add("torn", {4, 2}, DType::kFloat32,
              {{MakeBox({0, 0}, {2, 2})}, {MakeBox({3, 0}, {1, 2})}});
  const auto grid = trainer.Grid();
  CHECK(ReasonOf(grid) == reason::kGap);
  CHECK(FieldsOf(grid.status()).tensor == "torn");
  CHECK_FALSE(FieldsOf(grid.status()).remedy.empty());
  CHECK_THAT(Message(grid.status()), Catch::Contains("[2:3, 0:2]"));
}

TEST_CASE("a tensor that nobody holds is a gap") {
  Trainer trainer(2);
  trainer.Add("w", {4}, DType::kFloat32, {{}, {MakeBox({0}, {0})}});
  CHECK(ReasonOf(trainer.Grid()) == reason::kGap);
}

TEST_CASE("an overlap names tensor, boxes and ranks") {
  Trainer trainer(3);
  trainer.Add("w", {6}, DType::kFloat32,
              {{MakeBox({0}, {2})}, {MakeBox({2}, {3})}, {MakeBox({4}, {2})}});
  const auto grid = trainer.Grid();
  CHECK(ReasonOf(grid) == reason::kOverlap);
  CHECK(FieldsOf(grid.status()).tensor == "w");
  CHECK(FieldsOf(grid.status()).rank == "1,2");
  CHECK_THAT(Message(grid.status()), Catch::Contains("rank 1 [2:5]"));
  CHECK_THAT(Message(grid.status()), Catch::Contains("rank 2 [4:6]"));
}

TEST_CASE("one rank holding a box twice is an overlap, two ranks are replicas") {
  Trainer twice(1);
  twice.Add("w", {6}, DType::kFloat32, {{MakeBox({0}, {6}), MakeBox({0}, {6})}});
  CHECK(ReasonOf(twice.Grid()) == reason::kOverlap);
  Trainer replicas(2);
  replicas.Add("w", {6}, {2}, {Replicate()});
  CHECK(replicas.Grid().ok());
}

TEST_CASE("a replica group with a hole is not hidden by another that is whole") {
  Trainer trainer(4);  // ranks 0, 1 and 2, 3 should be replica groups; 3 holds the wrong half
  trainer.Add("w", {6}, DType::kFloat32,
              {{MakeBox({0}, {3})}, {MakeBox({3}, {3})}, {MakeBox({0}, {3})}, {MakeBox({2}, {3})}});
  CHECK(ReasonOf(trainer.Grid()) == reason::kOverlap);
}

TEST_CASE("a box that does not fit its tensor is refused") {
  const Box box = GENERATE(MakeBox({0}, {7}), MakeBox({-1}, {6}), MakeBox({0, 0}, {6, 1}),
                           MakeBox({1}, {INT64_MAX}), MakeBox({0}, {-1}), MakeBox({7}, {0}));
  Trainer trainer(2);
  trainer.Add("w", {6}, DType::kFloat32, {{MakeBox({0}, {6})}, {box}});
  const auto grid = trainer.Grid();
  CHECK(ReasonOf(grid) == reason::kShape);
  CHECK(FieldsOf(grid.status()).rank == "1");
}

TEST_CASE("lists that do not belong to the table are refused") {
  Trainer trainer(2);
  trainer.Add("w", {6}, {2}, {Shard(0)});
  SECTION("too few tensors") { trainer.shards()[1].first.pop_back(); }
  SECTION("unknown box") { trainer.shards()[1].box_index[0] = 5; }
  SECTION("more boxes than tensors use") { trainer.shards()[1].box_index.push_back(0); }
  SECTION("nothing at all") { trainer.shards()[1] = RankShards(); }
  SECTION("descending") { trainer.shards()[1].first = {1, 0}; }
  CHECK(ReasonOf(trainer.Grid()) == reason::kTableMismatch);
  CHECK(FieldsOf(trainer.Grid().status()).rank == "1");
}

TEST_CASE("replicas of a big shard send one stripe each") {
  Trainer trainer(4);
  trainer.Add("w", {64, 4}, {2, 2}, {Replicate(), Shard(0)});
  const auto grid = trainer.Grid(16);
  REQUIRE(grid.ok());
  CHECK(Supplied(trainer, *grid) == std::vector<int64_t>{64, 64, 64, 64});
  CHECK(Owners(*grid, 0, WholeBox({64, 4})).size() == 4);
}

TEST_CASE("replicas share small tensors out whole and evenly") {
  Trainer trainer(8);
  for (int i = 0; i < 64; ++i) {  // heavy and light ones alternate
    trainer.Add("w", {i % 2 == 0 ? 32 : 2}, {8}, {Replicate()});
  }
  const auto grid = trainer.Grid();
  REQUIRE(grid.ok());
  for (int64_t elements : Supplied(trainer, *grid)) {
    CHECK(std::abs(elements - (32 * 4 + 2 * 4)) <= 16);  // half a heavy tensor
  }
}

TEST_CASE("ranks with less of their own send more of what is replicated") {
  Trainer trainer(2);
  trainer.Add("uneven", {100}, DType::kFloat32, {{MakeBox({0}, {90})}, {MakeBox({90}, {10})}});
  for (int i = 0; i < 8; ++i) trainer.Add("norm", {10}, {2}, {Replicate()});
  const auto grid = trainer.Grid();
  REQUIRE(grid.ok());
  CHECK(Supplied(trainer, *grid) == std::vector<int64_t>{90, 90});
}

TEST_CASE("replicated shards are listed with their ranks") {
  Trainer trainer(4);
  trainer.Add("sharded", {4}, {4}, {Shard(0)});
  trainer.Add("hybrid", {4}, {2, 2}, {Replicate(), Shard(0)});
  const auto grid = trainer.Grid();
  REQUIRE(grid.ok());
  const auto replicated = grid->Replicated();
  REQUIRE(replicated.size() == 2);
  CHECK(replicated[0].tensor == 1);
  CHECK(replicated[0].box == MakeBox({0}, {2}));
  CHECK(replicated[0].ranks == std::vector<uint32_t>{0, 2});
  CHECK(replicated[1].ranks == std::vector<uint32_t>{1, 3});
  CHECK(replicated[1].shards == std::vector<uint32_t>{0, 0});
}

}  // namespace
}  // namespace weightd
