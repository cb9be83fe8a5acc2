#include "daemon/plan/data_path.h"

#include <catch2/catch.hpp>

namespace weightd {
namespace {

constexpr char kGpu0[] = "GPU-00000000-1111-2222-3333-444444444444";
constexpr char kGpu1[] = "GPU-00000000-1111-2222-3333-555555555555";

TEST_CASE("devices are host memory or a GPU's UUID") {
  for (const char* device : {"host", "host.1", "host.12"}) CHECK(IsHostDevice(device));
  for (const char* device : {"", "hos", "host.", "host.x", "host1", "host.1 ", "GPU-0", "0"}) {
    CHECK_FALSE(IsDevice(device));
  }
  CHECK(IsGpuDevice(kGpu0));
  CHECK_FALSE(IsHostDevice(kGpu0));
}

TEST_CASE("host memory goes by shm, from any of its workers to any other") {
  for (const char* target : {"host", "host.1"}) {
    const StatusOr<PathChoice> choice = ChoosePath({"host"}, {target});
    REQUIRE(choice.ok());
    CHECK(Name(choice->path) == "shm");
    CHECK(choice->reason == "both in host memory of this host");
  }
}

TEST_CASE("the path between GPUs is the fastest that the build has") {
  CHECK(ChoosePath({kGpu0}, {kGpu1}, {.ipc = true, .nccl = true})->path == Path::kIpc);
  CHECK(ChoosePath({kGpu0}, {kGpu0}, {.ipc = true})->reason == "same GPU");
  CHECK(ChoosePath({kGpu0}, {kGpu1}, {.nccl = true})->path == Path::kNccl);
}

TEST_CASE("what cannot be mapped is pulled out of a stage, which is written like any other") {
  const StatusOr<PathChoice> same = ChoosePath({kGpu0}, {kGpu0, false}, {.ipc = true});
  CHECK(Name(same->path) == "pull");
  CHECK(same->reason == "memory cannot be mapped: staged by ipc, same GPU");
  CHECK(ChoosePath({kGpu0}, {kGpu1, false}, {.nccl = true})->reason ==
        "memory cannot be mapped: staged by nccl, GPUs without mapped peer memory");
  CHECK(ChoosePath({"host"}, {"host.1", false})->path == Path::kPull);
  const Status source = ChoosePath({kGpu0, false}, {kGpu0}, {.ipc = true}).status();
  CHECK(FieldsOf(source).reason == reason::kNoPath);
  CHECK_THAT(Message(source), Catch::Contains("source"));
}

TEST_CASE("what the build does not serve is refused by name") {
  for (const Place& target : {Place{kGpu1}, Place{kGpu1, false}, Place{"host"}}) {
    const Status status = ChoosePath({kGpu0}, target, BuiltPaths{}).status();
    CHECK(status.code() == StatusCode::kFailedPrecondition);
    CHECK(FieldsOf(status).reason == reason::kNoPath);
    CHECK(Message(status).find(kGpu0) != std::string::npos);
    CHECK(Message(status).find(target.device) != std::string::npos);
    CHECK_FALSE(FieldsOf(status).remedy.empty());
  }
  CHECK(CheckServed("host.3").ok());
  CHECK(CheckServed(kGpu0).ok() == ThisBuild().ipc);
  if (!ThisBuild().ipc) CHECK(Message(CheckServed(kGpu0)).find(kGpu0) != std::string::npos);
}

/// Two actors hold the rows of w; engine rank 0 reads the first row, rank 1 both and has padding,
/// rank 2 has nothing.
struct Example {
  TensorTable table = {{"w", {2, 4}, DType::kFloat32}};
  std::vector<RankShards> shards;
  std::vector<RankLayout> layouts{3};

  Example() {
    for (int64_t rank = 0; rank < 2; ++rank) {
      RankShards held;
      held.boxes = {{{rank, 0}, {1, 4}}};
      held.first = {0, 1};
      held.box_index = {0};
      shards.push_back(held);
    }
    const Box row{{0, 0}, {1, 4}};
    const Box whole = WholeBox({2, 4});
    layouts[0].params = {{"w", {1, 4}, DType::kFloat32}};
    layouts[0].writes = {{.source_dim = {0, 1}, .source = row, .target = row}};
    layouts[1].params = {{"w", {2, 4}, DType::kBFloat16}, {"pad", {3}, DType::kFloat32}};
    layouts[1].writes = {{.source_dim = {0, 1}, .source = whole, .target = whole},
                         {.param = 1, .zero_fill = true, .target = WholeBox({3})}};
  }
  CompiledPlan Compile() const {
    std::vector<const RankLayout*> pointers;
    for (const RankLayout& layout : layouts) pointers.push_back(&layout);
    StatusOr<CompiledPlan> plan = CompilePlan(table, shards, pointers, {}, {});
    REQUIRE(plan.ok());
    return *std::move(plan);
  }
};

TEST_CASE("sources' workers write, the engine's own fills with zeros and verifies") {
  const Example example;
  const std::vector<std::string> sources = {"host", "host.1"};
  const std::vector<std::string> targets = {"host.2", "host.3", "host"};
  const std::vector<WorkerShare> shares = ShareWork(example.Compile(), sources, targets);
  REQUIRE(shares.size() == 4);
  using Targets = std::vector<uint32_t>;
  CHECK(shares[0].device == "host");
  CHECK(shares[0].writes == Targets{0, 1, 2});  // rank 2 receives nothing: its own worker says so
  CHECK(shares[0].verifies == Targets{2});
  CHECK(shares[1].device == "host.1");
  CHECK(shares[1].writes == Targets{1});
  CHECK(shares[1].verifies.empty());
  CHECK(shares[2].device == "host.2");
  CHECK(shares[2].writes.empty());
  CHECK(shares[2].verifies == Targets{0});
  CHECK(shares[3].writes == Targets{1});  // the padding
  CHECK(shares[3].verifies == Targets{1});
}

TEST_CASE("on one device its worker does everything") {
  const Example example;
  const std::vector<std::string> sources(2, "host");
  const std::vector<std::string> targets(3, "host");
  const std::vector<WorkerShare> shares = ShareWork(example.Compile(), sources, targets);
  REQUIRE(shares.size() == 1);
  CHECK(shares[0].writes == std::vector<uint32_t>{0, 1, 2});
  CHECK(shares[0].verifies == std::vector<uint32_t>{0, 1, 2});
}

TEST_CASE("the parts of all workers are the plan, each copy once") {
  const Example example;
  const CompiledPlan compiled = example.Compile();
  const RankLayout& layout = example.layouts[1];
  // Windows of one row: so that some lose all their copies.
  const RankPlan whole = EnumerateRank(example.table, compiled.grid, layout, {.bytes = 8});
  const RankPlan parts[] = {OwnCopies(whole, layout, {true, false}, false),
                            OwnCopies(whole, layout, {false, true}, false),
                            OwnCopies(whole, layout, {false, false}, true)};
  size_t copies = 0;
  uint64_t bytes = 0;
  for (const RankPlan& part : parts) {
    copies += part.copies.size();
    bytes += part.bytes;
    uint32_t next = 0;
    for (const Window& window : part.windows) {
      CHECK(window.begin == next);
      CHECK(window.end > window.begin);
      next = window.end;
    }
    CHECK(next == part.copies.size());
    CHECK(part.windows.size() < whole.windows.size());
  }
  CHECK(copies == whole.copies.size());
  CHECK(bytes == whole.bytes);
  for (const Copy& copy : parts[0].copies) CHECK(copy.source_rank == 0);
  for (const Copy& copy : parts[1].copies) CHECK(copy.source_rank == 1);
  for (const Copy& copy : parts[2].copies) CHECK(layout.writes[copy.write].zero_fill);
  const RankPlan all = OwnCopies(whole, layout, {true, true}, true);
  CHECK(all.bytes == whole.bytes);
  CHECK(all.windows.size() == whole.windows.size());
}

}  // namespace
}  // namespace weightd
