#include "daemon/server/plan_pages.h"

#include <catch2/catch.hpp>

#include "daemon/base/version.h"
#include "daemon/worker/plan_store.h"

namespace weightd {
namespace {

// Tensors of [2, 4] on two actors, one row and one device each, into one engine rank that holds
// them as they are.
WorkerPlan MakePlan(uint32_t tensors) {
  WorkerPlan plan;
  plan.handle = 9;
  auto table = std::make_shared<TensorTable>();
  auto layout = std::make_shared<RankLayout>();
  layout->coordinates = {.tp_rank = 1, .tp_size = 2};
  for (uint32_t t = 0; t < tensors; ++t) {
    const std::string name = fmt::format("model.layers.{}.some.quite.long.name.weight", t);
    table->push_back({name, {2, 4}, DType::kFloat32});
    layout->params.push_back({name, {2, 4}, DType::kBFloat16});
    layout->writes.push_back({.tensor = t,
                              .param = t,
                              .source_dim = {0, 1},
                              .source = WholeBox({2, 4}),
                              .target = WholeBox({2, 4})});
  }
  for (int64_t rank = 0; rank < 2; ++rank) {
    auto shards = std::make_shared<RankShards>();
    shards->boxes = {{{rank, 0}, {1, 4}}};
    shards->first = {0};
    for (uint32_t t = 0; t < tensors; ++t) {
      shards->box_index.push_back(0);
      shards->first.push_back(t + 1);
    }
    plan.shards.push_back(std::move(shards));
    plan.sources.push_back(static_cast<MemberId>(rank + 1));
    plan.source_devices.push_back(rank == 0 ? "host" : "host.1");
  }
  const std::vector<RankShards> shards = {*plan.shards[0], *plan.shards[1]};
  const RankLayout* const layouts[] = {layout.get()};
  plan.digest = PlanDigest(*table, shards, layouts, plan.limits);
  plan.table = std::move(table);
  plan.layouts.push_back(std::move(layout));
  plan.targets.push_back(static_cast<MemberId>(5));
  plan.labels.emplace_back("engine e0 tp 1");
  plan.target_devices.emplace_back("host.1");
  return plan;
}

StatusOr<std::shared_ptr<const LoadedPlan>> Load(const std::vector<v1::PlanPage>& pages,
                                                 const std::string& device = "host") {
  PlanAssembler assembler;
  for (const v1::PlanPage& page : pages) WEIGHTD_RETURN_IF_ERROR(assembler.Add(page));
  WEIGHTD_ASSIGN_OR_RETURN(PlanInput input, assembler.Finish());
  return LoadPlan(std::move(input), device);
}

TEST_CASE("a worker assembles from the pages the plan that the daemon proved") {
  for (uint32_t tensors : {1u, 3u, 20000u}) {
    const WorkerPlan plan = MakePlan(tensors);
    const std::vector<v1::PlanPage> pages = PlanPages(plan);
    CHECK((tensors < 100 ? pages.size() == 1 : pages.size() > 3));
    for (const v1::PlanPage& page : pages) CHECK(page.ByteSizeLong() < kMaxMessageBytes);
    const auto loaded = Load(pages);
    REQUIRE(loaded.ok());
    CHECK((*loaded)->digest == plan.digest);
    CHECK((*loaded)->bytes == tensors * 8u);
    const auto other = Load(pages, "host.1");
    REQUIRE(other.ok());
    CHECK((*other)->digest == plan.digest);
    CHECK((*other)->bytes == tensors * 8u);
  }
}

TEST_CASE("a plan that was changed on the way is refused") {
  std::vector<v1::PlanPage> pages = PlanPages(MakePlan(3));
  SECTION("a tensor is skipped") { pages[0].mutable_writes(0)->mutable_writes()->RemoveLast(); }
  SECTION("two boxes are swapped") {
    auto* first = pages[0].mutable_shards(0)->mutable_boxes(0);
    first->Swap(pages[0].mutable_shards(1)->mutable_boxes(0));
  }
  SECTION("a write reads another tensor") {
    pages[0].mutable_writes(0)->mutable_writes(0)->set_source(1);
  }
  SECTION("windows are cut differently") { pages[0].set_window_operations(7); }
  CHECK_FALSE(Load(pages).ok());
}

}  // namespace
}  // namespace weightd
