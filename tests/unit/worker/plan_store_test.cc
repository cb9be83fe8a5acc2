#include "daemon/worker/plan_store.h"

#include <catch2/catch.hpp>
#include <functional>

#include "tests/unit/worker/worker_testing.h"

namespace weightd {
namespace {

using testing::PagesOf;
using testing::ReasonOf;
using testing::SmallPlan;

StatusOr<PlanInput> Assemble(const std::vector<v1::PlanPage>& pages) {
  PlanAssembler assembler;
  for (const v1::PlanPage& page : pages) WEIGHTD_RETURN_IF_ERROR(assembler.Add(page));
  return assembler.Finish();
}

TEST_CASE("a plan comes out of its pages as it went in") {
  const PlanInput plan = SmallPlan();
  const StatusOr<PlanInput> assembled = Assemble(PagesOf(plan, 1));
  REQUIRE(assembled.ok());
  CHECK(assembled->table == plan.table);
  CHECK(assembled->sources == plan.sources);
  CHECK(assembled->targets == plan.targets);
  CHECK(assembled->labels == plan.labels);
  CHECK(assembled->digest == plan.digest);
  CHECK(assembled->limits.bytes == plan.limits.bytes);
  CHECK(assembled->limits.operations == plan.limits.operations);
  REQUIRE(assembled->shards.size() == 2);
  for (size_t rank = 0; rank < 2; ++rank) {
    CHECK(assembled->shards[rank].boxes == plan.shards[rank].boxes);
    CHECK(assembled->shards[rank].first == plan.shards[rank].first);
    CHECK(assembled->shards[rank].box_index == plan.shards[rank].box_index);
  }
  REQUIRE(assembled->layouts.size() == 1);
  CHECK(assembled->layouts[0].coordinates == plan.layouts[0].coordinates);
  CHECK(assembled->layouts[0].params == plan.layouts[0].params);
  CHECK(assembled->layouts[0].writes == plan.layouts[0].writes);
}

TEST_CASE("a loaded plan has the daemon's digest and knows its traffic") {
  const PlanInput input = SmallPlan();
  const auto plan = LoadPlan(input);
  REQUIRE(plan.ok());
  CHECK(std::string((*plan)->digest.begin(), (*plan)->digest.end()) == input.digest);
  CHECK((*plan)->bytes == 32 * 2 + 4 * 4 + 3 * 4);
  CHECK((*plan)->windows == 1);
}

TEST_CASE("a plan that the daemon sees differently is refused") {
  PlanInput input = SmallPlan();
  input.layouts[0].coordinates.tp_size = 2;
  CHECK(ReasonOf(LoadPlan(std::move(input)).status()) == reason::kPlanMismatch);
  input = SmallPlan();
  input.digest.clear();
  CHECK(ReasonOf(LoadPlan(std::move(input)).status()) == reason::kPlanMismatch);
}

TEST_CASE("gaps in shards and uncovered parameters are refused, whatever the digest says") {
  PlanInput input = SmallPlan();
  input.shards[1].boxes[0].extent = {3, 4};
  CHECK(ReasonOf(LoadPlan(std::move(input)).status()) == reason::kGap);
  input = SmallPlan();
  input.layouts[0].writes.pop_back();
  const Status status = LoadPlan(std::move(input)).status();
  CHECK(ReasonOf(status) == reason::kUncoveredParameter);
  CHECK(FieldsOf(status).rank == "engine e0 tp 0");
}

TEST_CASE("pages that point outside what they describe are refused") {
  const std::vector<v1::PlanPage> good = PagesOf(SmallPlan(), 1);
  using Breaker = std::function<void(v1::PlanPage*)>;
  const auto refused = [&good](const Breaker& breaks) {
    std::vector<v1::PlanPage> pages = good;
    v1::PlanPage extra;
    breaks(&extra);
    pages.insert(pages.end() - 1, extra);
    const Status status = Assemble(pages).status();
    INFO(Message(status));
    return !status.ok() && status.code() == StatusCode::kInvalidArgument;
  };
  CHECK(refused([](auto* page) {  // one tensor more than the shards describe
    page->add_shards()->add_boxes_per_tensor(0);
  }));
  CHECK(refused([](auto* page) { page->add_shards()->add_boxes_per_tensor(0xffffffffu); }));
  CHECK(refused([](auto* page) { page->add_shards()->add_box_index(0); }));
  CHECK(refused([](auto* page) { page->add_shards()->set_source(5); }));
  CHECK(refused([](auto* page) { page->add_shards()->set_source(0xffffffffu); }));
  CHECK(refused([](auto* page) { page->add_writes()->set_target(0xffffffffu); }));
  CHECK(refused([](auto* page) { page->add_writes()->set_target(1); }));  // has no member
  CHECK(refused([](auto* page) { page->add_sources(99); }));
  CHECK(refused([](auto* page) {
    v1::WriteSpec& write = *page->add_writes()->add_writes();
    write.set_param(77);
    write.set_zero_fill(true);
  }));
  CHECK(refused([](auto* page) {
    v1::WriteSpec& write = *page->add_writes()->add_writes();
    write.set_source(77);
    write.set_param(1);
    for (auto* list : {write.mutable_source_extent(), write.mutable_target_extent()}) list->Add(4);
    for (auto* list : {write.mutable_source_origin(), write.mutable_target_origin()}) list->Add(0);
    write.add_source_dim(0);
  }));
  CHECK(refused([](auto* page) {  // target beyond the parameter
    v1::WriteSpec& write = *page->add_writes()->add_writes();
    write.set_param(2);
    write.set_zero_fill(true);
    write.add_target_origin(1);
    write.add_target_extent(3);
  }));
}

TEST_CASE("a box index without a box is refused") {
  PlanInput plan = SmallPlan();
  plan.shards[0].box_index[1] = 9;
  CHECK(ReasonOf(Assemble(PagesOf(plan, 1)).status()) == reason::kProtocol);
}

TEST_CASE("a shard that leaves its tensor is refused with the tensor's name") {
  PlanInput plan = SmallPlan();
  plan.shards[1].boxes[0].origin = {5, 0};
  const Status status = Assemble(PagesOf(plan, 1)).status();
  CHECK_FALSE(status.ok());
  CHECK(FieldsOf(status).tensor == "w");
}

TEST_CASE("the plan used longest ago makes room") {
  PlanStore store;
  const auto plan = LoadPlan(SmallPlan());
  REQUIRE(plan.ok());
  for (uint64_t handle = 0; handle < kMaxPlans; ++handle) store.Put(handle, *plan);
  REQUIRE(store.Get(0).ok());
  store.Put(100, *plan);
  CHECK(store.Get(0).ok());
  CHECK(store.Get(100).ok());
  CHECK(ReasonOf(store.Get(1).status()) == reason::kNoPlan);
  store.Drop(0);
  CHECK(ReasonOf(store.Get(0).status()) == reason::kNoPlan);
}

}  // namespace
}  // namespace weightd
