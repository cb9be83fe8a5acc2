
#include <catch2/catch.hpp>

#include "tests/unit/plan/plan_testing.h"

namespace weightd {
namespace {

using testing::MakeBox;
using testing::Shard;
using testing::StraightWrite;
using testing::Trainer;
using testing::ZeroFill;

struct Input {
  TensorTable table;
  std::vector<RankShards> shards;
  std::vector<RankLayout> layouts;
  WindowLimits limits;

  Digest128 Digest() const {
    std::vector<const RankLayout*> pointers;
    for (const RankLayout& layout : layouts) pointers.push_back(&layout);
    return PlanDigest(table, shards, pointers, limits);
  }
};

Input MakeInput() {
  Trainer trainer(2);
  trainer.Add("w", {4, 6}, {2}, {Shard(0)});
  RankLayout layout;
  layout.params.push_back({"w", {6, 6}, DType::kBFloat16});
  layout.writes = {StraightWrite(0, 0, MakeBox({0, 0}, {4, 6}), MakeBox({0, 0}, {4, 6})),
                   ZeroFill(0, MakeBox({4, 0}, {2, 6}))};
  return {trainer.table(), trainer.shards(), {layout, layout}, {}};
}

TEST_CASE("equal inputs have equal digests, and what has no meaning does not count") {
  Input input = MakeInput();
  CHECK(input.Digest() == MakeInput().Digest());
  input.layouts[0].writes[1].source = MakeBox({1}, {1});  // of a zero fill
  input.layouts[0].writes[1].tensor = 7;
  input.layouts[0].writes[0].source_dim[5] = 3;  // beyond the target's dimensions
  CHECK(input.Digest() == MakeInput().Digest());
}

TEST_CASE("every part of the input counts") {
  Input input = MakeInput();
  RankLayout& layout = input.layouts[1];
  SECTION("tensor name") { input.table[0].name = "v"; }
  SECTION("tensor shape") { input.table[0].shape = {6, 4}; }
  SECTION("tensor dtype") { input.table[0].dtype = DType::kFloat16; }
  SECTION("shard") { input.shards[1].boxes[0].origin[0] = 1; }
  SECTION("shard index") { input.shards[1].box_index[0] = 1; }
  SECTION("ranks in another order") { std::swap(input.shards[0], input.shards[1]); }
  SECTION("window bytes") { input.limits.bytes = 1; }
  SECTION("window operations") { input.limits.operations = 1; }
  SECTION("engine ranks") { input.layouts.pop_back(); }
  SECTION("coordinates") { layout.coordinates.tp_rank = 1; }
  SECTION("parameter name") { layout.params[0].name = "v"; }
  SECTION("parameter shape") { layout.params[0].shape[0] = 7; }
  SECTION("parameter dtype") { layout.params[0].dtype = DType::kFloat32; }
  SECTION("parameter kind") { layout.params[0].kind = ParamKind::kDerived; }
  SECTION("stage") { layout.params[0].stage = 1; }
  SECTION("pulled") { layout.params[0].pulled = true; }
  SECTION("alias") { layout.params[0].alias_of = "v"; }
  SECTION("zero fill") { layout.writes[1].zero_fill = false; }
  SECTION("source") { layout.writes[0].source.origin[0] = 1; }
  SECTION("target") { layout.writes[0].target.extent[1] = 5; }
  SECTION("permutation") {
    std::swap(layout.writes[0].source_dim[0], layout.writes[0].source_dim[1]);
  }
  SECTION("order of writes") { std::swap(layout.writes[0], layout.writes[1]); }
  SECTION("a missing write") { layout.writes.pop_back(); }
  CHECK(input.Digest() != MakeInput().Digest());
}

TEST_CASE("the digest is the same on every machine and in every release") {
  std::string text;
  for (uint8_t byte : MakeInput().Digest()) text += fmt::format("{:02x}", byte);
  CHECK(text == "a8212cb6a2e0981a2e577c7670815959");
}

}  // namespace
}  // namespace weightd
