// Turns of a wire: what one end sends the other receives, in the same turn and of the same size,
// and nothing is lost on the way. WEIGHTD_TEST_SEED repeats a run.
#include "daemon/plan/wire_schedule.h"

#include <catch2/catch.hpp>
#include <map>
#include <random>

#include "tests/unit/plan/plan_testing.h"
#include "tests/unit/test_seed.h"

namespace weightd {
namespace {

using testing::Trainer;

/// Trainer ranks and engine ranks on random devices, some of whose pairs go over the wire.
struct Random {
  explicit Random(uint64_t seed) : random(seed), trainer(static_cast<int>(Number(1, 4))) {
    const auto ranks = static_cast<int>(trainer.shards().size());
    for (int i = 0; i < ranks; ++i) source_devices.push_back(Device());
    for (int64_t t = Number(1, 6); t > 0; --t) {
      Shape shape = {Number(1, 300), Number(1, 90)};
      trainer.Add("t" + std::to_string(t), shape, {ranks}, {testing::Shard(0)});
    }
    grid.emplace(*trainer.Grid());
    for (int64_t rank = Number(1, 3); rank > 0; --rank) AddEngineRank();
    for (const std::string& source : source_devices) {
      for (const std::string& target : target_devices) {
        if (source != target && Number(0, 9) < 8) pairs.emplace(source, target);
      }
    }
    wire_bytes = kMinWireBytes + static_cast<uint64_t>(Number(0, 1000)) * 100;
  }

  int64_t Number(int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(random);
  }
  std::string Device() { return "host." + std::to_string(Number(1, 4)); }

  void AddEngineRank() {
    RankLayout layout;
    for (uint32_t t = 0; t < trainer.table().size(); ++t) {
      const Shape& shape = trainer.table()[t].shape;
      const auto param = static_cast<uint32_t>(layout.params.size());
      const bool narrow = Number(0, 1) == 0;
      layout.params.push_back({"layers." + std::to_string(t) + ".w", shape,
                               narrow ? DType::kBFloat16 : DType::kFloat32});
      layout.writes.push_back(testing::StraightWrite(t, param, WholeBox(shape), WholeBox(shape)));
      if (Number(0, 3) == 0) {
        layout.params.push_back({"layers." + std::to_string(t) + ".pad", {5}, DType::kFloat32});
        layout.writes.push_back(testing::ZeroFill(param + 1, WholeBox({5})));
      }
    }
    plans.push_back(EnumerateRank(trainer.table(), *grid, layout, {}));
    layouts.push_back(std::move(layout));
    target_devices.push_back(Device());
  }

  WireSchedule Of(const std::string& device) const {
    std::vector<const RankLayout*> pointers;
    for (const RankLayout& layout : layouts) pointers.push_back(&layout);
    return ScheduleWire({plans, pointers, source_devices, target_devices, pairs, wire_bytes},
                        device);
  }

  std::mt19937_64 random;
  Trainer trainer;
  std::optional<SourceGrid> grid;
  std::vector<RankLayout> layouts;
  std::vector<RankPlan> plans;
  std::vector<std::string> source_devices;
  std::vector<std::string> target_devices;
  WirePairs pairs;
  uint64_t wire_bytes = 0;
};

/// A copy on one side of a message, with its place in the message.
struct Placed {
  uint32_t target;
  Copy copy;
  uint64_t place;
  bool operator==(const Placed&) const = default;
};

/// What lies in the part of `op`; checks that it stays inside and overlaps nothing.
std::vector<Placed> PartOf(const Random& random, const WireSide& side, uint32_t turn,
                           const WireOp& op) {
  std::vector<Placed> part;
  uint64_t end = op.offset;
  for (uint32_t i = side.copy_begin(turn); i < side.copy_end[turn]; ++i) {
    if (side.offsets[i] < op.offset || side.offsets[i] >= op.offset + op.bytes) continue;
    const Copy copy = side.copies[i];
    const RankLayout& layout = random.layouts[side.targets[i]];
    const DType dtype = layout.params[layout.writes[copy.write].param].dtype;
    CHECK(side.offsets[i] % kWireAlign == 0);
    CHECK(side.offsets[i] >= end);
    end = side.offsets[i] + side.copies.TargetElements(i) * SizeBytes(dtype);
    part.push_back({side.targets[i], copy, side.offsets[i] - op.offset});
  }
  CHECK(end <= op.offset + op.bytes);
  return part;
}

uint64_t OpBytes(const WireSide& side, uint32_t turn) {
  uint64_t bytes = 0;
  for (const WireOp& op : side.ops_of(turn)) bytes += op.bytes;
  return bytes;
}

TEST_CASE("both ends of every message agree, and slots are never too small") {
  size_t messages = 0, several_turns = 0;
  for (uint64_t round = 0; round < 150; ++round) {
    INFO("WEIGHTD_TEST_SEED=" << TestSeed() + round);
    const Random random(TestSeed() + round);
    std::vector<WireSchedule> all;
    for (const std::string& device : WireDevices(random.pairs)) all.push_back(random.Of(device));
    for (const WireSchedule& one : all) {
      REQUIRE(one.num_turns == all[0].num_turns);
      REQUIRE(one.sends.copy_end.size() == one.num_turns);
      REQUIRE(kWireSlots * (one.slots.send_bytes + one.slots.receive_bytes) <= random.wire_bytes);
      for (uint32_t turn = 0; turn < one.num_turns; ++turn) {
        REQUIRE(OpBytes(one.sends, turn) <= one.slots.send_bytes);
        REQUIRE(OpBytes(one.receives, turn) <= one.slots.receive_bytes);
        for (const WireOp& out : one.sends.ops_of(turn)) {
          const WireSchedule& other = all[out.peer];
          const auto ins = other.receives.ops_of(turn);
          const auto in = std::find_if(ins.begin(), ins.end(),
                                       [&](const WireOp& op) { return op.peer == one.rank; });
          REQUIRE(in != ins.end());
          REQUIRE(in->bytes == out.bytes);
          REQUIRE(PartOf(random, one.sends, turn, out) ==
                  PartOf(random, other.receives, turn, *in));
          ++messages;
        }
      }
    }
    several_turns += !all.empty() && all[0].num_turns > 2;
  }
  CHECK(messages > 300);
  CHECK(several_turns > 20);
}

TEST_CASE("every byte of a pair on the wire arrives once, and no other") {
  for (uint64_t round = 0; round < 100; ++round) {
    INFO("WEIGHTD_TEST_SEED=" << TestSeed() + round);
    const Random random(TestSeed() + round);
    std::map<std::pair<std::string, uint32_t>, uint64_t> expected, scheduled;
    for (uint32_t target = 0; target < random.plans.size(); ++target) {
      const RankLayout& layout = random.layouts[target];
      const CopyList& copies = random.plans[target].copies;
      for (size_t i = 0; i < copies.size(); ++i) {
        const Write& write = layout.writes[copies[i].write];
        const std::string& source = random.source_devices[copies[i].source_rank];
        if (write.zero_fill || !random.pairs.contains({source, random.target_devices[target]})) {
          continue;
        }
        expected[{source, target}] += copies.TargetElements(i);
      }
    }
    // The boxes of one engine rank must be disjoint: with equal sums, nothing is missing.
    std::map<std::pair<uint32_t, uint32_t>, std::vector<Box>> landed;
    for (const std::string& device : WireDevices(random.pairs)) {
      const WireSchedule own = random.Of(device);
      for (size_t i = 0; i < own.sends.copies.size(); ++i) {
        const Copy copy = own.sends.copies[i];
        const uint32_t target = own.sends.targets[i];
        REQUIRE(random.source_devices[copy.source_rank] == device);
        scheduled[{device, target}] += own.sends.copies.TargetElements(i);
        const Write& write = random.layouts[target].writes[copy.write];
        REQUIRE(Contains(write.target, copy.target));
        for (const Box& other : landed[{target, copy.write}]) {
          REQUIRE(Intersect(other, copy.target).empty());
        }
        landed[{target, copy.write}].push_back(copy.target);
      }
    }
    REQUIRE(scheduled == expected);
  }
}

TEST_CASE("a device without pairs has no turns, one with both roles halves its slots") {
  const WirePairs pairs = {{"host", "host.1"}, {"host.1", "host.2"}};
  constexpr uint64_t kHalf = kWireAlign * 100;
  constexpr uint64_t kBytes = 2 * kWireSlots * kHalf;
  CHECK(SlotsOf(pairs, "host", kBytes) == WireSlots{2 * kHalf, 0});
  CHECK(SlotsOf(pairs, "host.1", kBytes) == WireSlots{kHalf, kHalf});
  CHECK(SlotsOf(pairs, "host.2", kBytes) == WireSlots{0, 2 * kHalf});
  CHECK(SlotsOf(pairs, "host.3", kBytes) == WireSlots{});
  const Random random(TestSeed());
  CHECK(random.Of("GPU").num_turns == 0);
  CHECK(random.Of("GPU").devices.empty());
}

}  // namespace
}  // namespace weightd
