#include "daemon/worker/worker_core.h"

#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstring>
#include <functional>
#include <thread>

#include "tests/unit/worker/worker_fixture.h"

namespace weightd {
namespace {

using testing::kActor0;
using testing::kActor1;
using testing::kEngine;
using testing::kEnginePad;
using testing::kPeer;
using testing::MakeBinding;
using testing::ReasonOf;
using testing::SharedBuffer;
using testing::SmallPlan;
using Fixture = testing::WorkerFixture;

/// Calls a hook before every Transfer: a test acts while a step is running.
class HookedTransport final : public Transport {
 public:
  explicit HookedTransport(std::function<void(RunControl&)> hook) : hook_(std::move(hook)) {}
  std::string_view name() const override { return "hooked"; }
  StatusOr<RankDigests> Transfer(const BoundPlan& plan, size_t target,
                                 RunControl& control) override {
    hook_(control);
    return shm_.Transfer(plan, target, control);
  }
  StatusOr<RankDigests> Verify(const BoundPlan& plan, size_t target, RunControl& control) override {
    return shm_.Verify(plan, target, control);
  }
  StatusOr<uint64_t> DigestShard(const BoundPlan& plan, uint32_t rank, uint32_t tensor,
                                 uint32_t shard, RunControl& control) override {
    return shm_.DigestShard(plan, rank, tensor, shard, control);
  }

 private:
  ShmTransport shm_{{.num_threads = 2}};
  std::function<void(RunControl&)> hook_;
};

TEST_CASE("a transfer lands every element, and both sides have the same digests") {
  Fixture fixture;
  fixture.AttachAll();
  const v1::PlanLoaded loaded = fixture.Load(SmallPlan());
  REQUIRE(loaded.error().code() == 0);
  CHECK(loaded.digest() == SmallPlan().digest);
  CHECK(loaded.bytes() == 92);
  CHECK(loaded.windows() == 1);
  for (int round = 0; round < 2; ++round) {  // the second replays the plan
    const v1::StepDone transferred = fixture.Run(v1::STEP_TRANSFER);
    INFO(transferred.error().message());
    REQUIRE(transferred.error().code() == 0);
    CHECK(transferred.touched());
    CHECK(transferred.bytes() == 92);
    for (int i = 0; i < 32; ++i) CHECK(fixture.EngineW(i) == fixture.shard(i / 16)[i % 16]);
    for (int i = 0; i < 4; ++i) CHECK(fixture.engine_b()[i] == fixture.bias(0)[i]);
    for (int i = 0; i < 3; ++i) CHECK(fixture.engine_pad()[i] == 0.0f);
    CHECK(fixture.engine_memory.as<char>()[kEnginePad + 12] == 0x77);  // behind the last parameter
    const v1::StepDone verified = fixture.Run(v1::STEP_VERIFY);
    REQUIRE(verified.error().code() == 0);
    CHECK_FALSE(verified.touched());
    REQUIRE(transferred.digests_size() == 1);
    REQUIRE(verified.digests_size() == 1);
    CHECK(transferred.digests(0).tensors_size() == 2);
    CHECK(transferred.digests(0).words_size() == 3);
    CHECK(transferred.digests(0).SerializeAsString() == verified.digests(0).SerializeAsString());
    fixture.shard(0)[3] = 64.0f;
  }
}

TEST_CASE("a byte that changes after the transfer changes the engine's digests") {
  Fixture fixture;
  fixture.AttachAll();
  fixture.Load(SmallPlan());
  const v1::StepDone transferred = fixture.Run(v1::STEP_TRANSFER);
  fixture.engine_memory.as<char>()[17] ^= 1;
  const v1::StepDone verified = fixture.Run(v1::STEP_VERIFY);
  REQUIRE(verified.error().code() == 0);
  CHECK(transferred.digests(0).words(0) != verified.digests(0).words(0));
  CHECK(transferred.digests(0).words(1) == verified.digests(0).words(1));
}

TEST_CASE("a plan with another digest is not loaded") {
  Fixture fixture;
  PlanInput plan = SmallPlan();
  plan.digest[0] ^= 1;
  CHECK(ReasonOf(fixture.Load(plan).error()) == reason::kPlanMismatch);
  CHECK(ReasonOf(fixture.Run(v1::STEP_TRANSFER).error()) == reason::kNoPlan);
}

TEST_CASE("a step without one of its members names it and touches nothing") {
  Fixture fixture;
  fixture.AttachAll();
  fixture.Load(SmallPlan());
  fixture.actors[1].reset();
  REQUIRE(fixture.reports.TakeLost(kActor1).has_value());
  const v1::StepDone done = fixture.Run(v1::STEP_TRANSFER);
  CHECK(ReasonOf(done.error()) == reason::kPeerLost);
  CHECK(done.error().peer() == "actor 1");
  CHECK(done.error().phase() == "transfer");
  CHECK_FALSE(done.touched());
  CHECK(fixture.engine_memory.as<char>()[0] == 0x77);
}

TEST_CASE("memory that does not fit the plan is refused before a byte is written") {
  Fixture fixture;
  fixture.AttachAll();
  fixture.Load(SmallPlan());
  fixture.actors[0]->Bind({MakeBinding(0, 0, 0, {4, 4}, v1::DTYPE_FLOAT32),
                           MakeBinding(1, 0, 64, {5}, v1::DTYPE_FLOAT32)});
  REQUIRE(fixture.reports.TakeAttached(kActor0).has_value());
  const v1::StepDone shape = fixture.Run(v1::STEP_TRANSFER);
  CHECK(ReasonOf(shape.error()) == reason::kShape);
  CHECK(shape.error().tensor() == "b");
  CHECK(shape.error().rank() == "actor 0");
  CHECK_FALSE(shape.touched());
  fixture.actors[0]->Bind({MakeBinding(0, 0, 0, {4, 4}, v1::DTYPE_FLOAT32)});
  REQUIRE(fixture.reports.TakeAttached(kActor0).has_value());
  CHECK(ReasonOf(fixture.Run(v1::STEP_TRANSFER).error()) == reason::kMemoryMoved);
  CHECK(fixture.engine_memory.as<char>()[0] == 0x77);
}

TEST_CASE("memory that was truncated since registration is refused") {
  Fixture fixture;
  fixture.AttachAll();
  fixture.Load(SmallPlan());
  REQUIRE(::ftruncate(fixture.actor_memory[1].fd(), 0) == 0);
  const v1::StepDone done = fixture.Run(v1::STEP_TRANSFER);
  CHECK(ReasonOf(done.error()) == reason::kMemoryMoved);
  CHECK(done.error().rank() == "actor 1");
  CHECK_FALSE(done.touched());
}

TEST_CASE("an engine that dies during a step fails it, and is reported after it") {
  Fixture* fixture_ptr = nullptr;
  size_t reports_during_step = 1;
  Fixture fixture(std::make_unique<HookedTransport>([&](RunControl& control) {
    fixture_ptr->engine.reset();
    for (const auto end = testing::Soon(); !control.cancelled->load() && Clock::now() < end;) {
      std::this_thread::yield();
    }
    reports_during_step = fixture_ptr->reports.size();
  }));
  fixture_ptr = &fixture;
  fixture.AttachAll();
  fixture.Load(SmallPlan());
  const v1::StepDone done = fixture.Run(v1::STEP_TRANSFER);
  CHECK(ReasonOf(done.error()) == reason::kPeerLost);
  CHECK(done.error().peer() == "engine e0 tp 0");
  CHECK(done.touched());
  CHECK(reports_during_step == 0);  // it was still mapped
  CHECK(fixture.reports.TakeLost(kEngine).has_value());
}

TEST_CASE("a cancelled step ends with CANCELLED, whether it runs or waits") {
  Fixture* fixture_ptr = nullptr;
  Fixture fixture(std::make_unique<HookedTransport>(
      [&fixture_ptr](RunControl&) { fixture_ptr->CancelCurrent(); }));
  fixture_ptr = &fixture;
  fixture.AttachAll();
  fixture.Load(SmallPlan());
  CHECK(ReasonOf(fixture.Run(v1::STEP_TRANSFER).error()) == reason::kCancelled);
  CHECK(fixture.engine_memory.as<char>()[0] == 0x77);
}

TEST_CASE("a deadline ends a step") {
  Fixture fixture;
  fixture.AttachAll();
  fixture.Load(SmallPlan());
  fixture.Start(v1::STEP_TRANSFER, {}, 1, 1);
  CHECK(ReasonOf(fixture.Done().error()) == reason::kDeadline);
}

TEST_CASE("replicas that differ are named with their tensor and ranks") {
  Fixture fixture;
  fixture.AttachAll();
  fixture.Load(SmallPlan());
  REQUIRE(fixture.Run(v1::STEP_CHECK_REPLICAS).error().code() == 0);
  fixture.bias(1)[2] += 1.0f;
  const v1::StepDone done = fixture.Run(v1::STEP_CHECK_REPLICAS);
  CHECK(ReasonOf(done.error()) == reason::kReplicasDiffer);
  CHECK(done.error().tensor() == "b");
  CHECK(done.error().rank() == "actor 1");
  CHECK(done.error().message().find("actor 0") != std::string::npos);
  CHECK_FALSE(done.touched());
}

TEST_CASE("a plan of parameters only serves catch-up and nothing else") {
  Fixture fixture;
  fixture.AttachAll();
  PlanInput plan = SmallPlan();
  plan.table.clear();
  plan.sources.clear();
  plan.source_devices.clear();
  plan.shards.clear();
  plan.layouts[0].writes.clear();
  CHECK(fixture.Load(plan).error().code() == 0);
  for (const v1::Step step : {v1::STEP_TRANSFER, v1::STEP_VERIFY, v1::STEP_CHECK_REPLICAS}) {
    CHECK(ReasonOf(fixture.Run(step).error()) == reason::kNoPlan);
  }
  CHECK(fixture.Run(v1::STEP_RETAIN, {}, 3).error().code() == 0);
  CHECK(fixture.Run(v1::STEP_RESTORE, {}, 3).error().code() == 0);
}

TEST_CASE("a late engine is filled from a peer, or from the copy that was retained") {
  Fixture fixture;
  fixture.AttachAll();
  fixture.Load(SmallPlan());
  REQUIRE(fixture.Run(v1::STEP_TRANSFER).error().code() == 0);
  const SharedBuffer peer_memory(4096);
  std::memcpy(peer_memory.as<char>(), fixture.engine_memory.as<char>(), 4096);
  fixture.Expect(kPeer, true, "engine e1 tp 0");
  const auto peer = fixture.Attach(kPeer, &peer_memory, fixture.EngineBindings());
  REQUIRE(fixture.Run(v1::STEP_RETAIN, {}, 9).error().code() == 0);

  for (const bool from_peer : {true, false}) {
    std::memset(fixture.engine_memory.as<char>(), 0, 4096);
    const v1::StepDone done =
        from_peer ? fixture.Run(v1::STEP_COPY_PEER, {kPeer}) : fixture.Run(v1::STEP_RESTORE, {}, 9);
    INFO(done.error().message());
    REQUIRE(done.error().code() == 0);
    CHECK(done.touched());
    CHECK(done.bytes() == 92);
    for (int i = 0; i < 32; ++i) CHECK(fixture.EngineW(i) == fixture.shard(i / 16)[i % 16]);
    for (int i = 0; i < 4; ++i) CHECK(fixture.engine_b()[i] == fixture.bias(0)[i]);
  }
  CHECK(ReasonOf(fixture.Run(v1::STEP_COPY_PEER).error()) == reason::kProtocol);
  v1::WorkerCommand drop;
  drop.mutable_drop_retained()->set_version(10);
  fixture.core->Handle(std::move(drop));
  CHECK(ReasonOf(fixture.Run(v1::STEP_RESTORE, {}, 9).error()) == reason::kNoPlan);
}

}  // namespace
}  // namespace weightd
