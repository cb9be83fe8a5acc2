// Parameters that are received in stages, in the same memory.
#include "tests/unit/worker/worker_fixture.h"

namespace weightd::testing {
namespace {

/// SmallPlan with "w" in stage 1, "b" in stage 2 and "pad" in place.
PlanInput StagedPlan() {
  PlanInput plan = SmallPlan();
  std::vector<ParamInfo>& params = plan.layouts[0].params;
  params[0].kind = params[1].kind = ParamKind::kDerived;
  params[0].stage = 1;
  params[1].stage = 2;
  const std::vector<const RankLayout*> layouts = {&plan.layouts[0]};
  const Digest128 digest = PlanDigest(plan.table, plan.shards, layouts, plan.limits);
  plan.digest.assign(digest.begin(), digest.end());
  return plan;
}

/// A worker whose engine rank lends the same bytes for "w" and "b".
struct StagedFixture : WorkerFixture {
  StagedFixture() {
    Expect(kActor0, false, "actor 0");
    Expect(kActor1, false, "actor 1");
    Expect(kEngine, true, "engine e0 tp 0");
    actors[0] = Attach(kActor0, &actor_memory[0], ActorBindings());
    actors[1] = Attach(kActor1, &actor_memory[1], ActorBindings());
    engine = Attach(kEngine, &engine_memory,
                    {MakeBinding(0, 0, kEngineW, {8, 4}, v1::DTYPE_BFLOAT16),
                     MakeBinding(1, 0, kEngineW, {4}, v1::DTYPE_FLOAT32),
                     MakeBinding(2, 0, kEnginePad, {3}, v1::DTYPE_FLOAT32)});
  }
  v1::StepDone RunRound(v1::Step step, uint32_t number) {
    round = number;
    return Run(step);
  }
};

std::vector<uint64_t> Words(const v1::StepDone& done) {
  REQUIRE_FALSE(done.has_error());
  REQUIRE(done.digests_size() == 1);
  return {done.digests(0).words().begin(), done.digests(0).words().end()};
}

std::vector<uint32_t> Tensors(const v1::StepDone& done) {
  return {done.digests(0).tensors().begin(), done.digests(0).tensors().end()};
}

}  // namespace

TEST_CASE("a round writes its stage and nothing else, and verifies what it wrote") {
  StagedFixture worker;
  const v1::PlanLoaded loaded = worker.Load(StagedPlan());
  REQUIRE_FALSE(loaded.has_error());
  CHECK(loaded.bytes() == 64 + 16 + 12);
  CHECK(loaded.windows() == 2);

  const v1::StepDone first = worker.RunRound(v1::STEP_TRANSFER, 0);
  CHECK(Tensors(first) == std::vector<uint32_t>{0});
  CHECK(first.bytes() == 64 + 12);
  for (int i = 0; i < 32; ++i) CHECK(worker.EngineW(i) == worker.shard(i / 16)[i % 16]);
  for (int i = 0; i < 3; ++i) CHECK(worker.engine_pad()[i] == 0.0f);
  CHECK(Words(worker.RunRound(v1::STEP_VERIFY, 0)) == Words(first));

  const v1::StepDone second = worker.RunRound(v1::STEP_TRANSFER, 1);
  CHECK(Tensors(second) == std::vector<uint32_t>{1});
  CHECK(second.bytes() == 16);
  const auto* b = worker.engine_memory.as<float>();
  for (int i = 0; i < 4; ++i) CHECK(b[i] == worker.bias(0)[i]);
  for (int i = 8; i < 32; ++i) CHECK(worker.EngineW(i) == worker.shard(i / 16)[i % 16]);
  const v1::StepDone verified = worker.RunRound(v1::STEP_VERIFY, 1);
  CHECK(verified.bytes() == 16);
  CHECK(Words(verified) == Words(second));
  // What the first round brought is gone, so it must not be looked at again.
  CHECK(Words(worker.RunRound(v1::STEP_VERIFY, 0)) != Words(first));
}

TEST_CASE("the rounds of two workers add up to what the engine's own verifies") {
  StagedFixture first;
  WorkerFixture second{std::make_unique<ShmTransport>(ShmOptions{.num_threads = 1}), "host.1"};
  PlanInput plan = StagedPlan();
  plan.source_devices = {kHostDevice, "host.1"};
  second.Expect(kActor1, false, "actor 1");
  second.Expect(kEngine, true, "engine e0 tp 0");
  const auto actor = second.Attach(kActor1, &first.actor_memory[1], second.ActorBindings());
  const auto lent = second.Attach(kEngine, &first.engine_memory,
                                  {MakeBinding(0, 0, kEngineW, {8, 4}, v1::DTYPE_BFLOAT16),
                                   MakeBinding(1, 0, kEngineW, {4}, v1::DTYPE_FLOAT32),
                                   MakeBinding(2, 0, kEnginePad, {3}, v1::DTYPE_FLOAT32)});
  REQUIRE_FALSE(first.Load(plan).has_error());
  REQUIRE_FALSE(second.Load(plan).has_error());
  for (const uint32_t round : {0u, 1u}) {
    second.round = round;
    const std::vector<uint64_t> one = Words(first.RunRound(v1::STEP_TRANSFER, round));
    const std::vector<uint64_t> other = Words(second.Run(v1::STEP_TRANSFER));
    const std::vector<uint64_t> sum = {one[0] + other[0], one[1] + other[1]};
    CHECK(Words(first.RunRound(v1::STEP_VERIFY, round)) == sum);
  }
}

TEST_CASE("a round that the plan does not have is refused") {
  StagedFixture worker;
  REQUIRE_FALSE(worker.Load(StagedPlan()).has_error());
  const v1::StepDone done = worker.RunRound(v1::STEP_TRANSFER, 2);
  CHECK(ReasonOf(done.error()) == reason::kProtocol);
  CHECK_FALSE(done.touched());
}

TEST_CASE("memory that stages share is not copied to late engines") {
  StagedFixture worker;
  PlanInput plan = StagedPlan();
  PlanInput catch_up;
  catch_up.layouts = {plan.layouts[0]};
  catch_up.layouts[0].writes.clear();
  catch_up.targets = plan.targets;
  catch_up.target_devices = plan.target_devices;
  catch_up.labels = plan.labels;
  REQUIRE_FALSE(worker.Load(catch_up).has_error());
  CHECK(ReasonOf(worker.Run(v1::STEP_COPY_PEER, {kEngine}).error()) == reason::kStaged);
  CHECK(ReasonOf(worker.Run(v1::STEP_RETAIN).error()) == reason::kStaged);
}

TEST_CASE("a plan whose stages have a gap is refused") {
  PlanInput plan = StagedPlan();
  plan.layouts[0].params[1].stage = 0xffffffff;
  CHECK(ReasonOf(LoadPlan(std::move(plan)).status()) == reason::kConfig);
}

}  // namespace weightd::testing
