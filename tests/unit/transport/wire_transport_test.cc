// The wire over unix sockets beside shm: random trainers and engines on random devices, each device
// a thread; bytes and digests must be the same bit for bit. WEIGHTD_TEST_SEED repeats a run.
#include "daemon/transport/wire/wire_transport.h"

#include <catch2/catch.hpp>
#include <map>
#include <random>
#include <thread>

#include "daemon/plan/data_path.h"
#include "daemon/transport/shm/shm_transport.h"
#include "daemon/transport/socket/socket_wire.h"
#include "daemon/transport/wire/host_stage.h"
#include "tests/unit/test_seed.h"

namespace weightd {
namespace {

/// A trainer by rows of float32 tensors, and engine ranks that take column slices of them, some
/// transposed, as bfloat16 or float32.
class World {
 public:
  explicit World(uint64_t seed) : random_(seed) {
    const int64_t actors = Number(1, 3), engines = Number(1, 3);
    for (int64_t i = 0; i < actors; ++i) source_devices.push_back(Device());
    shards.resize(static_cast<size_t>(actors));
    for (RankShards& held : shards) held.first = {0};
    for (int64_t t = Number(2, 6); t > 0; --t) AddTensor();
    for (int64_t i = 0; i < engines; ++i) AddEngine(i, engines);
    grid.emplace(*SourceGrid::Build(table, shards));
    for (const RankLayout& layout : layouts) {
      whole.push_back(EnumerateRank(table, *grid, layout, {.bytes = 16 << 10}));
    }
    for (const std::string& source : source_devices) {
      for (const std::string& target : target_devices) {
        if (source != target) pairs.emplace(source, target);
      }
    }
  }

  int64_t Number(int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(random_);
  }
  std::string Device() { return "host." + std::to_string(Number(1, 3)); }

  void AddTensor() {
    const Shape shape = {Number(1, 400), 6 * Number(1, 30)};
    const auto tensor = static_cast<uint32_t>(table.size());
    table.push_back({"t" + std::to_string(tensor), shape, DType::kFloat32});
    const auto ranks = static_cast<int64_t>(shards.size());
    for (int64_t r = 0; r < ranks; ++r) {
      RankShards& held = shards[static_cast<size_t>(r)];
      const int64_t begin = shape[0] * r / ranks, end = shape[0] * (r + 1) / ranks;
      held.boxes.push_back({{begin, 0}, {end - begin, shape[1]}});
      held.box_index.push_back(tensor);
      held.first.push_back(tensor + 1);
      std::vector<uint32_t> values(static_cast<size_t>((end - begin) * shape[1]));
      for (uint32_t& value : values) value = 0x3c000000U + (random_() & 0x83ffffffU);
      memory[{static_cast<uint32_t>(r), tensor}] = std::move(values);
    }
  }

  void AddEngine(int64_t rank, int64_t size) {
    RankLayout layout;
    for (uint32_t t = 0; t < table.size(); ++t) {
      const Shape& shape = table[t].shape;
      const int64_t columns = shape[1] / size;
      const bool turned = Number(0, 2) == 0;
      const auto param = static_cast<uint32_t>(layout.params.size());
      layout.params.push_back({"layers." + std::to_string(t) + ".w",
                               turned ? Shape{columns, shape[0]} : Shape{shape[0], columns},
                               Number(0, 1) == 0 ? DType::kBFloat16 : DType::kFloat32});
      Write write;
      write.tensor = t;
      write.param = param;
      write.source = {{0, rank * columns}, {shape[0], columns}};
      write.target = WholeBox(layout.params.back().shape);
      write.source_dim = {static_cast<int8_t>(turned ? 1 : 0), static_cast<int8_t>(turned ? 0 : 1)};
      layout.writes.push_back(write);
    }
    layout.params.push_back({"pad", {17}, DType::kFloat32});
    Write zero;
    zero.param = static_cast<uint32_t>(layout.params.size() - 1);
    zero.zero_fill = true;
    zero.target = WholeBox({17});
    layout.writes.push_back(zero);
    layouts.push_back(std::move(layout));
    target_devices.push_back(Device());
  }

  std::mt19937_64 random_;
  TensorTable table;
  std::vector<RankShards> shards;
  std::map<std::pair<uint32_t, uint32_t>, std::vector<uint32_t>> memory;  // (rank, tensor)
  std::vector<RankLayout> layouts;
  std::vector<RankPlan> whole;
  std::vector<std::string> source_devices, target_devices;
  std::optional<SourceGrid> grid;
  WirePairs pairs;
};

/// Memory of all engine ranks.
using Params = std::vector<std::vector<std::vector<std::byte>>>;

Params Fresh(const World& world) {
  Params params;
  for (const RankLayout& layout : world.layouts) {
    auto& rank = params.emplace_back();
    for (const ParamInfo& param : layout.params) {
      rank.emplace_back(static_cast<size_t>(NumElements(param.shape)) * SizeBytes(param.dtype),
                        std::byte{0x5a});
    }
  }
  return params;
}

/// What one device sees; an empty name: everything.
BoundPlan Bind(World& world, Params& params, const std::vector<RankPlan>& plans,
               const std::string& device) {
  BoundPlan bound;
  bound.table = &world.table;
  bound.shards = world.shards;
  bound.sources.resize(world.shards.size());
  for (uint32_t r = 0; r < world.shards.size(); ++r) {
    for (uint32_t t = 0; t < world.table.size(); ++t) {
      const bool own = device.empty() || world.source_devices[r] == device;
      bound.sources[r].push_back(
          {own ? reinterpret_cast<std::byte*>(world.memory[{r, t}].data()) : nullptr,
           RowMajorStrides(world.shards[r].boxes[t].extent), false});
    }
  }
  for (size_t i = 0; i < world.layouts.size(); ++i) {
    BoundTarget target;
    target.layout = &world.layouts[i];
    target.plan = &plans[i];
    target.label = "engine " + std::to_string(i);
    for (size_t p = 0; p < world.layouts[i].params.size(); ++p) {
      const bool own = device.empty() || world.target_devices[i] == device;
      target.params.push_back({own ? params[i][p].data() : nullptr,
                               RowMajorStrides(world.layouts[i].params[p].shape), false});
    }
    bound.targets.push_back(std::move(target));
  }
  return bound;
}

/// Digest words by engine rank, added up.
using Words = std::map<uint32_t, std::vector<uint64_t>>;

void Add(uint32_t target, const RankDigests& digests, Words* words) {
  std::vector<uint64_t>& sum = (*words)[target];
  sum.resize(digests.words.size());
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += digests.words[i];
}

/// One device's whole transfer: direct copies by shm, the others by the wire.
Status RunDevice(World& world, Params& params, const std::string& device, const std::string& id,
                 uint64_t wire_bytes, Words* words) {
  std::vector<bool> own;
  for (const std::string& source : world.source_devices) own.push_back(source == device);
  std::vector<RankPlan> plans;
  for (size_t i = 0; i < world.layouts.size(); ++i) {
    const bool mine = world.target_devices[i] == device;
    plans.push_back(mine ? OwnCopies(world.whole[i], world.layouts[i], own, true) : RankPlan());
  }
  std::vector<const RankLayout*> layouts;
  for (const RankLayout& layout : world.layouts) layouts.push_back(&layout);
  const WireSchedule schedule = ScheduleWire(
      {world.whole, layouts, world.source_devices, world.target_devices, world.pairs, wire_bytes},
      device);
  const BoundPlan bound = Bind(world, params, plans, device);
  const std::atomic<bool> cancelled{false};
  RunControl control;
  control.cancelled = &cancelled;
  for (uint32_t i = 0; i < world.layouts.size(); ++i) {
    if (world.target_devices[i] != device) continue;
    WEIGHTD_ASSIGN_OR_RETURN(const RankDigests digests,
                             ShmTransport({.num_threads = 1}).Transfer(bound, i, control));
    Add(i, digests, words);
  }
  if (schedule.devices.empty()) return absl::OkStatus();
  WireTransport wires(std::make_unique<SocketWireMaker>(), std::make_unique<HostStage>());
  WEIGHTD_RETURN_IF_ERROR(wires.Open({.wire = 1, .plan = 7, .id = id}, schedule, cancelled));
  for (int round = 0; round < 2; ++round) {  // the second must give the same again
    WEIGHTD_ASSIGN_OR_RETURN(const WireTransport::Digests digests,
                             wires.Transfer(7, 1, bound, schedule, control, milliseconds(20'000)));
    for (const auto& [target, rank] : digests) {
      if (round == 1) Add(target, rank, words);
    }
  }
  // Catch's own macros are for one thread.
  if (wires.staging_bytes() <= wire_bytes) return absl::OkStatus();
  return Error(StatusCode::kInternal, "", "", "staging is too large: {}", wires.staging_bytes());
}

TEST_CASE("the wire lands what shm lands, and its digests are the same") {
  size_t wired = 0;
  for (uint64_t round = 0; round < 25; ++round) {
    INFO("WEIGHTD_TEST_SEED=" << TestSeed() + round);
    World world(TestSeed() + round);
    Params expected = Fresh(world), landed = Fresh(world);
    Words expected_words;
    const BoundPlan all = Bind(world, expected, world.whole, "");
    RunControl control;
    for (uint32_t i = 0; i < world.layouts.size(); ++i) {
      const auto digests = ShmTransport({.num_threads = 1}).Transfer(all, i, control);
      REQUIRE(digests.ok());
      Add(i, *digests, &expected_words);
    }
    std::set<std::string> devices(world.source_devices.begin(), world.source_devices.end());
    devices.insert(world.target_devices.begin(), world.target_devices.end());
    const std::string id = *SocketWireMaker().MakeId();
    const uint64_t wire_bytes = kMinWireBytes + static_cast<uint64_t>(world.Number(0, 100'000));
    std::vector<Words> words(devices.size());
    std::vector<Status> statuses(devices.size());
    {
      std::vector<std::jthread> threads;
      size_t number = 0;
      for (const std::string& device : devices) {
        threads.emplace_back([&, device, n = number++] {
          statuses[n] = RunDevice(world, landed, device, id, wire_bytes, &words[n]);
        });
      }
    }
    Words sums;
    for (size_t n = 0; n < words.size(); ++n) {
      INFO(statuses[n]);
      REQUIRE(statuses[n].ok());
      for (const auto& [target, part] : words[n]) {
        std::vector<uint64_t>& sum = sums[target];
        sum.resize(part.size());
        for (size_t i = 0; i < part.size(); ++i) sum[i] += part[i];
      }
    }
    REQUIRE(landed == expected);
    REQUIRE(sums == expected_words);
    wired += !world.pairs.empty();
  }
  CHECK(wired > 10);
}

}  // namespace
}  // namespace weightd
