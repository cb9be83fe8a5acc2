// The turns of a transfer on wires and stages that end what they do in any order that they may.
// WEIGHTD_TEST_SEED repeats a run.
#include "daemon/transport/wire/wire_run.h"

#include <array>
#include <catch2/catch.hpp>
#include <deque>
#include <random>
#include <set>

#include "daemon/transport/socket/socket_wire.h"
#include "tests/unit/test_seed.h"

namespace weightd {
namespace {

constexpr uint64_t kSlot = 1024;

/// A device that sends in some turns and receives in some.
WireSchedule RandomSchedule(std::mt19937_64& random) {
  WireSchedule schedule;
  schedule.devices = {"host", "host.1"};
  schedule.slots = {kSlot, kSlot};
  schedule.num_turns = static_cast<uint32_t>(random() % 30);
  for (uint32_t turn = 0; turn < schedule.num_turns; ++turn) {
    for (WireSide* side : {&schedule.sends, &schedule.receives}) {
      if (random() % 4 != 0) side->ops.push_back({1, 0, 1 + turn});
      side->op_end.push_back(static_cast<uint32_t>(side->ops.size()));
      side->copy_end.push_back(0);
      side->bytes.push_back(0);
    }
  }
  return schedule;
}

/// Ends the groups of each lane in order, the lanes in any.
class RandomWire final : public Wire {
 public:
  RandomWire(std::mt19937_64& random, const std::byte* ring) : random_(random), ring_(ring) {}

  StatusOr<bool> Opened() override { return true; }
  StatusOr<bool> Ready(uint32_t) override { return random_() % 3 != 0; }
  Status Start(uint32_t lane, std::span<const WireMessage> group) override {
    CHECK(lane < kWireLanes);
    REQUIRE_FALSE(group.empty());
    const uint64_t turn = group.front().bytes - 1;
    for (const WireMessage& message : group) {
      CHECK(message.bytes == turn + 1);
      const auto slot = static_cast<uint64_t>(message.data - ring_) / kSlot;
      CHECK(slot == turn % kWireSlots + (message.send ? 0 : kWireSlots));
    }
    CHECK(lane == turn % kWireLanes);
    lanes[lane].push_back(turn);
    started.push_back(turn);
    CHECK(started.size() - ended_ <= kWireSlots);
    return absl::OkStatus();
  }
  StatusOr<uint64_t> Ended() override {
    for (auto& lane : lanes) {
      if (lane.empty() || random_() % 3 != 0) continue;
      over.insert(lane.front());
      lane.pop_front();
    }
    while (ended_ < started.size() && over.contains(started[ended_])) ++ended_;
    return ended_;
  }
  void Abort() override {}
  void AwaitNews(microseconds) override {}

  /// True if a group of the turn is under way.
  bool Holds(uint64_t turn) const {
    return std::find(started.begin(), started.end(), turn) != started.end() && !over.contains(turn);
  }

  std::array<std::deque<uint64_t>, kWireLanes> lanes;  ///< turns under way
  std::vector<uint64_t> started;                       ///< turns
  std::set<uint64_t> over;                             ///< turns

 private:
  std::mt19937_64& random_;
  const std::byte* const ring_;
  uint64_t ended_ = 0;
};

/// Ends packing and scattering late, and checks that nothing it writes is in use.
class RandomStage final : public WireStage {
 public:
  RandomStage(std::mt19937_64& random, const RandomWire& wire, std::byte* ring)
      : random_(random), wire_(wire), ring_(ring) {}

  Status Reserve(uint64_t) override { return absl::OkStatus(); }
  std::byte* ring() override { return ring_; }
  uint64_t ring_bytes() const override { return kSlot * 2 * kWireSlots; }
  Status Begin(const BoundPlan&, const WireSchedule&, RunControl&) override {
    return absl::OkStatus();
  }
  Status Pack(uint32_t turn) override {
    CHECK(turn == packing++);
    if (turn >= kWireSlots) CHECK_FALSE(wire_.Holds(turn - kWireSlots));
    return absl::OkStatus();
  }
  StatusOr<uint32_t> Packed() override { return packed += random_() % 2 != 0 && packed < packing; }
  Status Scatter(uint32_t turn) override {
    CHECK(turn == scattering++);
    CHECK_FALSE(wire_.Holds(turn));
    // The slot may be received into again once this is over, and not before.
    CHECK_FALSE(wire_.Holds(turn + kWireSlots));
    return absl::OkStatus();
  }
  StatusOr<uint32_t> Scattered() override {
    if (random_() % 2 == 0 || scattered == scattering) return scattered;
    CHECK_FALSE(wire_.Holds(scattered + kWireSlots));
    return ++scattered;
  }
  StatusOr<std::vector<uint64_t>> Words() override { return std::vector<uint64_t>(); }
  Status Drain() override { return absl::OkStatus(); }

  uint32_t packing = 0, packed = 0, scattering = 0, scattered = 0;

 private:
  std::mt19937_64& random_;
  const RandomWire& wire_;
  std::byte* const ring_;
};

TEST_CASE("a turn keeps to its lane, and no slot is written while it is in use") {
  size_t passed = 0;
  for (uint64_t round = 0; round < 200; ++round) {
    INFO("WEIGHTD_TEST_SEED=" << TestSeed() + round);
    std::mt19937_64 random(TestSeed() + round);
    const WireSchedule schedule = RandomSchedule(random);
    std::vector<std::byte> ring(kSlot * 2 * kWireSlots);
    RandomWire wire(random, ring.data());
    RandomStage stage(random, wire, ring.data());
    WireRun run(wire, stage, schedule, 0);
    for (int steps = 0; !run.finished(); ++steps) {
      REQUIRE(steps < 10'000);
      REQUIRE(run.Advance().ok());
      REQUIRE(run.turns_done() == stage.scattered);
      for (size_t i = 1; i < wire.lanes.size(); ++i) {
        const auto& ahead = wire.lanes[i];
        passed += !ahead.empty() && !wire.lanes[0].empty() &&
                  ahead.front() > wire.lanes[0].front() &&
                  wire.over.contains(ahead.front() - kWireLanes);
      }
    }
    REQUIRE(stage.scattered == schedule.num_turns);
    REQUIRE(run.groups() == wire.started.size());
    REQUIRE(wire.over.size() == wire.started.size());
  }
  CHECK(passed > 100);
}

TEST_CASE("lanes of sockets pass each other, and ends are counted in the order of starts") {
  const std::string id = *SocketWireMaker().MakeId();
  std::array<std::unique_ptr<SocketWire>, 2> ranks;
  for (uint32_t rank = 0; rank < 2; ++rank) ranks[rank] = *SocketWire::Create(id, rank, 2);
  for (bool open = false; !open;) {
    open = true;
    for (auto& rank : ranks) open = *rank->Opened() && open;
  }
  std::array<std::byte, 2> sent = {std::byte{1}, std::byte{2}}, landed{};
  for (uint32_t lane = 0; lane < 2; ++lane) {
    const WireMessage message{0, false, &landed[lane], 1};
    REQUIRE(ranks[1]->Start(lane, std::span(&message, 1)).ok());
  }
  const auto send = [&](uint32_t lane) {
    const WireMessage message{1, true, &sent[lane], 1};
    REQUIRE(ranks[0]->Start(lane, std::span(&message, 1)).ok());
    REQUIRE(*ranks[0]->Ended() > 0);
  };
  send(1);
  while (landed[1] == std::byte{}) REQUIRE(*ranks[1]->Ended() == 0);
  CHECK(landed[0] == std::byte{});
  send(0);
  while (*ranks[1]->Ended() < 2) continue;
  CHECK(landed == sent);
}

}  // namespace
}  // namespace weightd
