// One plan on two workers: actor 0 on host, actor 1 and the engine rank on host.1.
#include "tests/unit/worker/worker_fixture.h"

namespace weightd::testing {
namespace {

constexpr char kOther[] = "host.1";

PlanInput SharedPlan() {
  PlanInput plan = SmallPlan();
  plan.source_devices = {kHostDevice, kOther};
  plan.target_devices = {kOther};
  return plan;
}

/// Both workers with what they need attached; the engine's memory is lent to both.
struct TwoWorkers {
  TwoWorkers() {
    first.Expect(kActor0, false, "actor 0");
    first.Expect(kEngine, true, "engine e0 tp 0");
    second.Expect(kActor1, false, "actor 1");
    second.Expect(kEngine, true, "engine e0 tp 0");
    clients.push_back(first.Attach(kActor0, &first.actor_memory[0], first.ActorBindings()));
    clients.push_back(first.Attach(kEngine, &first.engine_memory, first.EngineBindings()));
    clients.push_back(second.Attach(kActor1, &first.actor_memory[1], first.ActorBindings()));
    clients.push_back(second.Attach(kEngine, &first.engine_memory, first.EngineBindings()));
    for (WorkerFixture* worker : {&first, &second}) {
      loaded.push_back(worker->Load(SharedPlan()));
      REQUIRE_FALSE(loaded.back().has_error());
    }
  }

  WorkerFixture first;  // its buffers are used by both
  WorkerFixture second{std::make_unique<ShmTransport>(ShmOptions{.num_threads = 1}), kOther};
  std::vector<std::unique_ptr<FakeClient>> clients;
  std::vector<v1::PlanLoaded> loaded;
};

}  // namespace

TEST_CASE("each worker copies what its own sources supply, and the zero fill with its own engine") {
  TwoWorkers workers;
  CHECK(workers.loaded[0].digest() == workers.loaded[1].digest());
  // w is 64 bytes as bfloat16, half from each; b comes whole from one of its two holders.
  CHECK(workers.loaded[0].bytes() + workers.loaded[1].bytes() == 64 + 16 + 12);

  const v1::StepDone one = workers.first.Run(v1::STEP_TRANSFER);
  REQUIRE_FALSE(one.has_error());
  for (int i = 0; i < 16; ++i) CHECK(workers.first.EngineW(i) == workers.first.shard(0)[i]);
  CHECK(workers.first.engine_memory.as<uint16_t>()[16] == 0x7777);
  CHECK(workers.first.engine_memory.as<uint8_t>()[kEnginePad] == 0x77);

  const v1::StepDone two = workers.second.Run(v1::STEP_TRANSFER);
  REQUIRE_FALSE(two.has_error());
  for (int i = 0; i < 16; ++i) CHECK(workers.first.EngineW(16 + i) == workers.first.shard(1)[i]);
  for (int i = 0; i < 4; ++i) CHECK(workers.first.engine_b()[i] == workers.first.bias(0)[i]);
  for (int i = 0; i < 3; ++i) CHECK(workers.first.engine_pad()[i] == 0.0f);

  const v1::StepDone verified = workers.second.Run(v1::STEP_VERIFY);
  REQUIRE_FALSE(verified.has_error());
  const auto& whole = verified.digests(0).words();
  REQUIRE(one.digests(0).words_size() == whole.size());
  REQUIRE(two.digests(0).words_size() == whole.size());
  for (int i = 0; i < whole.size(); ++i) {
    CHECK(one.digests(0).words(i) + two.digests(0).words(i) == whole[i]);
  }
  CHECK(one.digests(0).tensors_size() == verified.digests(0).tensors_size());
}

TEST_CASE("workers of several devices hand over one word per shard that they share") {
  TwoWorkers workers;
  for (const bool equal : {true, false}) {
    if (!equal) workers.first.bias(1)[2] += 1.0f;
    const v1::StepDone one = workers.first.Run(v1::STEP_CHECK_REPLICAS);
    const v1::StepDone two = workers.second.Run(v1::STEP_CHECK_REPLICAS);
    REQUIRE_FALSE(one.has_error());
    REQUIRE_FALSE(two.has_error());
    REQUIRE(one.shard_words_size() == 1);  // b; nobody else holds the halves of w
    REQUIRE(two.shard_words_size() == 1);
    CHECK((one.shard_words(0) == two.shard_words(0)) == equal);
  }
}

TEST_CASE("a worker does not need the memory of trainer ranks on other devices") {
  TwoWorkers workers;
  workers.first.Forget(kActor0);
  REQUIRE(workers.first.reports.TakeLost(kActor0).has_value());
  CHECK_FALSE(workers.second.Run(v1::STEP_TRANSFER).has_error());
  const v1::StepDone done = workers.first.Run(v1::STEP_TRANSFER);
  CHECK(ReasonOf(done.error()) == reason::kPeerLost);
  CHECK_FALSE(done.touched());
}

TEST_CASE("a plan that names the devices of too few actors is refused") {
  PlanInput plan = SharedPlan();
  plan.source_devices.pop_back();
  WorkerFixture worker;
  CHECK(ReasonOf(worker.Load(plan).error()) == reason::kProtocol);
}

}  // namespace weightd::testing
