// One plan on two workers that share no memory: actor 0 on host, actor 1 and the engine rank on
// host.1; what actor 0 supplies goes over the wire.
#include <thread>

#include "tests/unit/worker/worker_fixture.h"

namespace weightd::testing {
namespace {

constexpr char kOther[] = "host.1";

PlanInput WiredPlan() {
  PlanInput plan = SmallPlan();
  plan.source_devices = {kHostDevice, kOther};
  plan.target_devices = {kOther};
  plan.wire_pairs = {{kHostDevice, kOther}};
  plan.wire_bytes = kMinWireBytes;
  return plan;
}

/// Both workers with what they need attached; nobody lends to the other's.
struct TwoWorkers {
  TwoWorkers() {
    first.Expect(kActor0, false, "actor 0");
    second->Expect(kActor1, false, "actor 1");
    second->Expect(kEngine, true, "engine e0 tp 0");
    clients.push_back(first.Attach(kActor0, &first.actor_memory[0], first.ActorBindings()));
    clients.push_back(second->Attach(kActor1, &first.actor_memory[1], first.ActorBindings()));
    clients.push_back(second->Attach(kEngine, &first.engine_memory, first.EngineBindings()));
    for (WorkerFixture* worker : {&first, second.get()}) {
      REQUIRE_FALSE(worker->Load(WiredPlan()).has_error());
    }
  }

  std::string MakeId(uint64_t wire) {
    v1::WorkerCommand command;
    command.mutable_make_wire_id()->set_wire(wire);
    first.core->Handle(std::move(command));
    const auto made = first.reports.TakeWireId();
    REQUIRE(made.has_value());
    REQUIRE(made->wire() == wire);
    return made->id();
  }
  static void Offer(WorkerFixture& worker, uint64_t wire, const std::string& id) {
    v1::WorkerCommand command;
    command.mutable_open_wire()->set_wire(wire);
    command.mutable_open_wire()->set_plan(kPlan);
    command.mutable_open_wire()->set_id(id);
    worker.core->Handle(std::move(command));
    worker.wire = wire;
  }
  static v1::WireReady Ready(WorkerFixture& worker) {
    const auto ready = worker.reports.TakeWireReady();
    REQUIRE(ready.has_value());
    return *ready;
  }
  void Open(uint64_t wire) {
    const std::string id = MakeId(wire);
    Offer(first, wire, id);
    Offer(*second, wire, id);
    for (WorkerFixture* worker : {&first, second.get()}) {
      const v1::WireReady ready = Ready(*worker);
      CHECK(ready.wire() == wire);
      CHECK(ReasonOf(ready.error()).empty());
      CHECK(ready.staging_bytes() <= kMinWireBytes);
      CHECK(ready.staging_bytes() > 0);
    }
  }
  void CheckEngine() {
    for (int i = 0; i < 32; ++i) CHECK(first.EngineW(i) == first.shard(i / 16)[i % 16]);
    for (int i = 0; i < 4; ++i) CHECK(first.engine_b()[i] == first.bias(0)[i]);
    for (int i = 0; i < 3; ++i) CHECK(first.engine_pad()[i] == 0.0f);
  }

  WorkerFixture first;  // its buffers are used by both
  std::unique_ptr<WorkerFixture> second = std::make_unique<WorkerFixture>(
      std::make_unique<ShmTransport>(ShmOptions{.num_threads = 1}), kOther);
  std::vector<std::unique_ptr<FakeClient>> clients;
};

}  // namespace

TEST_CASE("what cannot be stored is sent, and the words of both workers are those of the memory") {
  TwoWorkers workers;
  workers.Open(1);
  for (int round = 1; round <= 3; ++round) {
    workers.first.shard(0)[3] = static_cast<float>(round);
    workers.first.Start(v1::STEP_TRANSFER);
    workers.second->Start(v1::STEP_TRANSFER);
    const v1::StepDone one = workers.first.Done();
    const v1::StepDone two = workers.second->Done();
    REQUIRE(ReasonOf(one.error()).empty());
    REQUIRE(ReasonOf(two.error()).empty());
    CHECK_FALSE(one.touched());
    CHECK(two.touched());
    CHECK(one.bytes() + two.bytes() == 64 + 16 + 12);
    workers.CheckEngine();
    const v1::StepDone verified = workers.second->Run(v1::STEP_VERIFY);
    REQUIRE_FALSE(verified.has_error());
    const auto& whole = verified.digests(0).words();
    REQUIRE(one.digests(0).words_size() == whole.size());
    REQUIRE(two.digests(0).words_size() == whole.size());
    for (int i = 0; i < whole.size(); ++i) {
      CHECK(one.digests(0).words(i) + two.digests(0).words(i) == whole[i]);
    }
    CHECK(one.digests(0).words(0) != 0);
  }
}

TEST_CASE("a receiver whose sender is silent is cancelled at once, and the next wire works") {
  TwoWorkers workers;
  workers.Open(1);
  workers.second->Start(v1::STEP_TRANSFER);
  std::this_thread::sleep_for(milliseconds(50));
  CHECK(workers.second->reports.size() == 0);
  workers.second->CancelCurrent();
  const v1::StepDone cancelled = workers.second->Done();
  CHECK(ReasonOf(cancelled.error()) == reason::kCancelled);
  CHECK(cancelled.error().phase() == "transfer");
  CHECK(cancelled.error().tensor() == "w");
  CHECK(cancelled.staging_bytes() == 0);
  CHECK(ReasonOf(workers.second->Run(v1::STEP_TRANSFER).error()) == reason::kWire);
  workers.Open(2);
  workers.first.Start(v1::STEP_TRANSFER);
  CHECK_FALSE(workers.second->Run(v1::STEP_TRANSFER).has_error());
  CHECK_FALSE(workers.first.Done().has_error());
  workers.CheckEngine();
}

TEST_CASE("a turn that does not end in time names tensor and peer") {
  TwoWorkers workers;
  workers.Open(1);
  workers.second->turn_deadline = milliseconds(100);
  const v1::StepDone done = workers.second->Run(v1::STEP_TRANSFER);
  CHECK(ReasonOf(done.error()) == reason::kDeadline);
  CHECK(done.error().peer() == "worker host");
  CHECK(done.error().tensor() == "w");
}

TEST_CASE("a lost member ends the turns of its own worker, which says who it was") {
  TwoWorkers workers;
  workers.Open(1);
  workers.second->Start(v1::STEP_TRANSFER);
  std::this_thread::sleep_for(milliseconds(50));
  workers.clients[2].reset();  // the engine rank
  const v1::StepDone done = workers.second->Done();
  CHECK(ReasonOf(done.error()) == reason::kPeerLost);
  REQUIRE(workers.second->reports.TakeLost(kEngine).has_value());
}

TEST_CASE("an opening for which not all come is ended by CloseWire or its deadline") {
  TwoWorkers workers;
  TwoWorkers::Offer(workers.first, 1, workers.MakeId(1));
  std::this_thread::sleep_for(milliseconds(20));
  v1::WorkerCommand command;
  command.mutable_close_wire()->set_wire(1);
  workers.first.core->Handle(std::move(command));
  CHECK(ReasonOf(TwoWorkers::Ready(workers.first).error()) == reason::kCancelled);
  v1::WorkerCommand late;
  late.mutable_open_wire()->set_wire(2);
  late.mutable_open_wire()->set_plan(kPlan);
  late.mutable_open_wire()->set_id(workers.MakeId(2));
  late.mutable_open_wire()->set_deadline_us(50'000);
  workers.first.core->Handle(std::move(late));
  const v1::WireReady ready = TwoWorkers::Ready(workers.first);
  CHECK(ReasonOf(ready.error()) == reason::kDeadline);
  CHECK(ready.staging_bytes() == 0);
  workers.Open(3);
}

TEST_CASE("a wire without plan, with a foreign id or with too little staging is refused") {
  TwoWorkers workers;
  TwoWorkers::Offer(workers.first, 1, "not an id");
  CHECK(ReasonOf(TwoWorkers::Ready(workers.first).error()) == reason::kProtocol);
  WorkerFixture empty;
  TwoWorkers::Offer(empty, 1, workers.MakeId(1));
  CHECK(ReasonOf(TwoWorkers::Ready(empty).error()) == reason::kNoPlan);
  PlanInput plan = WiredPlan();
  plan.wire_bytes = kMinWireBytes - 1;
  CHECK(ReasonOf(empty.Load(plan).error()) == reason::kProtocol);
}

}  // namespace weightd::testing
