// Random trainers and engine layouts against the element-by-element checker, and the proof that the
// checker notices broken plans. WEIGHTD_TEST_SEED repeats a run.
#include <algorithm>
#include <catch2/catch.hpp>
#include <numeric>
#include <random>

#include "daemon/plan/rounds.h"
#include "tests/unit/plan/plan_testing.h"
#include "tests/unit/test_seed.h"

namespace weightd {
namespace {

using testing::FaultOf;
using testing::MeshSize;
using testing::Placement;
using testing::SentBytes;
using testing::ShardOf;
using testing::Trainer;

constexpr int kRounds = 400;

/// Draws numbers, meshes, tensors and layouts.
class Draw {
 public:
  explicit Draw(uint64_t seed) : random_(seed) {}

  int64_t Number(int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(random_);
  }
  bool Chance(int percent) { return Number(1, 100) <= percent; }

  std::vector<int> Mesh() {
    std::vector<int> mesh(static_cast<size_t>(Number(1, 3)));
    for (int& size : mesh) size = static_cast<int>(Number(1, 3));
    return mesh;
  }

  /// Adds tensors that are placed at random: sharded unevenly, strided, replicated, in intervals.
  Trainer MakeTrainer() {
    const std::vector<int> mesh = Mesh();
    Trainer trainer(MeshSize(mesh));
    const int64_t tensors = Number(1, 5);
    for (int64_t i = 0; i < tensors; ++i) {
      Shape shape;
      for (int64_t dims = Number(0, 3); dims > 0; --dims) shape.push_back(Number(1, 9));
      trainer.Add("t" + std::to_string(i), shape, Chance(50) ? DType::kFloat32 : DType::kBFloat16,
                  Boxes(shape, mesh));
    }
    return trainer;
  }

  /// A layout whose parameters are random partitions into permuted source blocks and zero fill.
  RankLayout MakeLayout(const TensorTable& table) {
    RankLayout layout;
    const int64_t params = Number(1, 5);
    for (int64_t i = 0; i < params; ++i) {
      Shape shape;
      for (int64_t dims = Number(0, 3); dims > 0; --dims) shape.push_back(Number(1, 8));
      const auto param = static_cast<uint32_t>(i);
      layout.params.push_back({"layers." + std::to_string(Number(0, 3)) + ".p", shape,
                               Chance(50) ? DType::kFloat32 : DType::kBFloat16});
      Fill(table, param, WholeBox(shape), layout);
    }
    std::shuffle(layout.writes.begin(), layout.writes.end(), random_);
    return layout;
  }

  WindowLimits MakeLimits() {
    return {static_cast<uint64_t>(Number(1, 300)), static_cast<uint32_t>(Number(1, 12))};
  }

 private:
  std::vector<Placement> Placements(const Shape& shape, const std::vector<int>& mesh) {
    std::vector<Placement> placements(mesh.size());
    for (Placement& placement : placements) {
      if (shape.empty() || Chance(30)) continue;
      placement.dim = static_cast<int>(Number(0, shape.size() - 1));
      placement.strided = Chance(30);
    }
    return placements;
  }

  /// What every rank holds. Intervals: the tensor is cut in two first and each half is sharded.
  std::vector<std::vector<Box>> Boxes(const Shape& shape, const std::vector<int>& mesh) {
    std::vector<Box> intervals = {WholeBox(shape)};
    const int dim = shape.empty() ? 0 : static_cast<int>(Number(0, shape.size() - 1));
    if (!shape.empty() && shape[dim] > 1 && Chance(30)) intervals = Cut(intervals[0], dim);
    std::vector<std::vector<Box>> boxes(static_cast<size_t>(MeshSize(mesh)));
    for (const Box& interval : intervals) {
      const std::vector<Placement> placements = Placements(shape, mesh);
      for (size_t rank = 0; rank < boxes.size(); ++rank) {
        Box box = ShardOf(interval.extent, mesh, placements, static_cast<int>(rank));
        for (int i = 0; i < shape.size(); ++i) box.origin[i] += interval.origin[i];
        boxes[rank].push_back(box);
      }
    }
    return boxes;
  }

  std::vector<Box> Cut(const Box& box, int dim) {
    const int64_t at = Number(1, box.extent[dim] - 1);
    std::vector<Box> parts = {box, box};
    parts[0].extent[dim] = at;
    parts[1].origin[dim] += at;
    parts[1].extent[dim] -= at;
    return parts;
  }

  /// Covers `target` with writes: cuts it in two for a while, then fills the parts.
  void Fill(const TensorTable& table, uint32_t param, const Box& target, RankLayout& layout) {
    const int dim = target.num_dims() == 0
                        ? 0
                        : static_cast<int>(Number(0, std::max(0, target.num_dims() - 1)));
    if (target.num_dims() > 0 && target.extent[dim] > 1 && Chance(60)) {
      for (const Box& part : Cut(target, dim)) Fill(table, param, part, layout);
      return;
    }
    Write write = {0, param, false, {}, Box(), target};
    if (Chance(20) || !FindSource(table, write)) {
      write.zero_fill = true;
      write.source = Box();
    }
    layout.writes.push_back(write);
  }

  /// Finds a tensor with room for the target under a random permutation.
  bool FindSource(const TensorTable& table, Write& write) {
    for (int attempt = 0; attempt < 8; ++attempt) {
      write.tensor = static_cast<uint32_t>(Number(0, static_cast<int64_t>(table.size()) - 1));
      const Shape& shape = table[write.tensor].shape;
      std::vector<int> order(static_cast<size_t>(shape.size()));
      std::iota(order.begin(), order.end(), 0);
      std::shuffle(order.begin(), order.end(), random_);
      write.source = {Dims::Filled(shape.size(), 0), Dims::Filled(shape.size(), 1)};
      size_t next = 0;
      bool fits = true;
      for (int j = 0; j < write.target.num_dims(); ++j) {
        const bool follows = next < order.size() && (write.target.extent[j] > 1 || Chance(50));
        write.source_dim[static_cast<size_t>(j)] =
            follows ? static_cast<int8_t>(order[next]) : int8_t{-1};
        if (!follows) fits = fits && write.target.extent[j] == 1;
        if (follows) write.source.extent[order[next++]] = write.target.extent[j];
      }
      for (int i = 0; fits && i < shape.size(); ++i) {
        fits = write.source.extent[i] <= shape[i];
        if (fits) write.source.origin[i] = Number(0, shape[i] - write.source.extent[i]);
      }
      if (fits) return true;
    }
    return false;
  }

  std::mt19937_64 random_;
};

/// One random case, planned.
struct Case {
  Trainer trainer{0};
  RankLayout layout;
  WindowLimits limits;
  RankPlan plan;

  explicit Case(uint64_t seed) {
    Draw draw(seed);
    trainer = draw.MakeTrainer();
    layout = draw.MakeLayout(trainer.table());
    limits = draw.MakeLimits();
    const auto grid = trainer.Grid(draw.Chance(50) ? kMinStripeBytes : 8);
    INFO("seed " << seed << ": " << grid.status());
    REQUIRE(grid.ok());
    const Status covered = CheckCoverage(trainer.table(), layout);
    INFO(covered);
    REQUIRE(covered.ok());
    plan = EnumerateRank(trainer.table(), *grid, layout, limits);
  }

  std::string Fault() const { return FaultOf(plan.copies); }
  std::string FaultOf(const CopyList& copies) const {
    RankPlan changed = plan;
    changed.copies = copies;
    return testing::FaultOf(trainer.table(), trainer.shards(), layout, changed, limits);
  }
};

CopyList ListOf(const std::vector<Copy>& copies) {
  CopyList list;
  for (const Copy& copy : copies) list.push_back(copy);
  return list;
}

TEST_CASE("random plans move every element exactly as the layout says") {
  for (uint64_t round = 0; round < kRounds; ++round) {
    const Case random(TestSeed() + round);
    INFO("WEIGHTD_TEST_SEED=" << TestSeed() + round);
    REQUIRE(random.Fault() == "");
  }
}

TEST_CASE("the same input gives the same plan") {
  for (uint64_t round = 0; round < 20; ++round) {
    const Case once(TestSeed() + round);
    const Case again(TestSeed() + round);
    const std::vector<Copy> copies(once.plan.copies.begin(), once.plan.copies.end());
    REQUIRE(copies == std::vector<Copy>(again.plan.copies.begin(), again.plan.copies.end()));
  }
}

/// Breaks a list of copies in one way; false if this case offers no occasion.
bool Mutate(const std::string& kind, const Case& random, std::vector<Copy>& copies) {
  if (kind == "skip") {
    copies.pop_back();
    return true;
  }
  for (size_t i = 0; i < copies.size(); ++i) {
    const Write& write = random.layout.writes[copies[i].write];
    if (write.zero_fill) continue;
    if (kind == "shift source" && copies[i].source.num_dims() > 0) {
      ++copies[i].source.origin[0];
      return true;
    }
    if (kind == "shift target" && copies[i].target.num_dims() > 0) {
      ++copies[i].target.origin[0];
      return true;
    }
    if (kind == "other shard") {
      ++copies[i].shard;
      return true;
    }
    for (size_t j = i + 1; kind == "swap" && j < copies.size(); ++j) {
      if (copies[j].write != copies[i].write ||
          copies[j].target.extent != copies[i].target.extent) {
        continue;
      }
      std::swap(copies[i].target, copies[j].target);
      return true;
    }
  }
  return false;
}

TEST_CASE("the checker notices a plan that is broken on purpose") {
  const std::string kind = GENERATE("skip", "swap", "shift source", "shift target", "other shard");
  int mutated = 0;
  for (uint64_t round = 0; round < kRounds; ++round) {
    const Case random(TestSeed() + round);
    std::vector<Copy> copies(random.plan.copies.begin(), random.plan.copies.end());
    if (copies.empty() || !Mutate(kind, random, copies)) continue;
    ++mutated;
    INFO(kind << " WEIGHTD_TEST_SEED=" << TestSeed() + round);
    REQUIRE(random.FaultOf(ListOf(copies)) != "");
  }
  CHECK(mutated > kRounds / 10);
}

TEST_CASE("the proof notices a layout that is broken on purpose") {
  int refused = 0;
  for (uint64_t round = 0; round < kRounds; ++round) {
    Case random(TestSeed() + round);
    std::vector<Write>& writes = random.layout.writes;
    if (round % 3 == 0) {
      writes.pop_back();
    } else if (round % 3 == 1) {
      writes.push_back(writes.front());
    } else if (writes[0].target.num_dims() > 0) {
      ++writes[0].target.origin[0];
    } else {
      continue;
    }
    INFO("WEIGHTD_TEST_SEED=" << TestSeed() + round);
    REQUIRE_FALSE(CheckCoverage(random.trainer.table(), random.layout).ok());
    ++refused;
  }
  CHECK(refused > kRounds / 2);
}

TEST_CASE("the rounds of a layout have each of its writes once, and land what it says") {
  size_t most = 0;
  for (uint64_t round = 0; round < kRounds; ++round) {
    Case random(TestSeed() + round);
    RankLayout& layout = random.layout;
    Draw draw(TestSeed() + round);
    uint32_t stages = 0;
    for (ParamInfo& param : layout.params) {
      if (draw.Chance(30)) continue;
      param.kind = ParamKind::kDerived;
      param.stage = static_cast<uint32_t>(draw.Number(1, ++stages));
    }
    for (uint32_t stage = 1; stage <= NumStages(layout.params); ++stage) {  // close gaps
      const auto has = [stage](const ParamInfo& param) { return param.stage == stage; };
      if (std::any_of(layout.params.begin(), layout.params.end(), has)) continue;
      for (ParamInfo& param : layout.params) param.stage -= param.stage > stage ? 1 : 0;
      --stage;
    }
    INFO("WEIGHTD_TEST_SEED=" << TestSeed() + round);
    REQUIRE(CheckStages(layout.params).ok());
    const std::vector<RoundLayout> rounds = SplitRounds(layout);
    REQUIRE(rounds.size() == NumRounds(NumStages(layout.params)));
    most = std::max(most, rounds.size());
    std::vector<Write> found;
    const auto grid = random.trainer.Grid();
    for (uint32_t r = 0; r < rounds.size(); ++r) {
      for (size_t i = 0; i < rounds[r].params.size(); ++i) {
        CHECK(rounds[r].layout.params[i] == layout.params[rounds[r].params[i]]);
        CHECK(RoundOf(rounds[r].layout.params[i]) == r);
      }
      const RankLayout& part = rounds[r].layout;
      const RankPlan plan = EnumerateRank(random.trainer.table(), *grid, part, random.limits);
      CHECK(FaultOf(random.trainer.table(), random.trainer.shards(), part, plan, random.limits) ==
            "");
      for (Write write : part.writes) {
        write.param = rounds[r].params[write.param];
        found.push_back(write);
      }
    }
    REQUIRE(found.size() == layout.writes.size());
    CHECK(std::is_permutation(found.begin(), found.end(), layout.writes.begin()));
  }
  CHECK(most > 2);
}

TEST_CASE("the proof notices a trainer that is broken on purpose") {
  int refused = 0;
  for (uint64_t round = 0; round < kRounds; ++round) {
    const Case random(TestSeed() + round);
    std::vector<RankShards> shards = random.trainer.shards();
    // Only one holder: moving its box leaves a gap, an overlap or the tensor.
    if (shards.size() > 1) continue;
    for (Box& box : shards[0].boxes) {
      if (box.num_dims() == 0 || box.empty()) continue;
      ++box.origin[0];
      INFO("WEIGHTD_TEST_SEED=" << TestSeed() + round);
      REQUIRE_FALSE(SourceGrid::Build(random.trainer.table(), shards).ok());
      ++refused;
      break;
    }
  }
  CHECK(refused > 0);
}

TEST_CASE("replicas send even shares of a model") {
  const auto replicas = GENERATE(2, 3, 4);
  const auto pieces = GENERATE(1, 2, 5);
  const std::vector<int> mesh = {replicas, pieces};
  Draw draw(TestSeed());
  Trainer trainer(replicas * pieces);
  RankLayout layout;
  uint64_t total = 0;
  for (uint32_t t = 0; t < 60; ++t) {
    const bool norm = t % 3 == 0;
    const Shape shape = norm ? Shape{draw.Number(16, 64)} : Shape{draw.Number(32, 96), 64};
    const Placement sharded = norm ? testing::Replicate() : testing::Shard(0);
    trainer.Add("t" + std::to_string(t), shape, mesh, {testing::Replicate(), sharded});
    layout.params.push_back({"p" + std::to_string(t), shape, DType::kFloat32});
    layout.writes.push_back(testing::StraightWrite(t, t, WholeBox(shape), WholeBox(shape)));
    total += static_cast<uint64_t>(NumElements(shape)) * 4;
  }
  const auto grid = trainer.Grid(draw.Chance(50) ? kMinStripeBytes : 512);
  REQUIRE(grid.ok());
  const RankPlan plan = EnumerateRank(trainer.table(), *grid, layout, {});
  const std::vector<uint64_t> sent =
      SentBytes(trainer.table(), trainer.shards().size(), layout, plan);
  CHECK(std::accumulate(sent.begin(), sent.end(), uint64_t{0}) == total);
  // Uneven chunks leave later ranks of a replica with less to send: compare holders of one piece.
  const uint64_t largest_box = 96 * 64 * 4;
  for (int piece = 0; piece < pieces; ++piece) {
    uint64_t least = UINT64_MAX;
    uint64_t most = 0;
    for (int replica = 0; replica < replicas; ++replica) {
      const uint64_t bytes = sent[static_cast<size_t>(replica * pieces + piece)];
      least = std::min(least, bytes);
      most = std::max(most, bytes);
    }
    INFO("WEIGHTD_TEST_SEED=" << TestSeed() << " least " << least << " most " << most);
    CHECK(most - least <= largest_box);
  }
}

}  // namespace
}  // namespace weightd
