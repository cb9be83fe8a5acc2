// A whole worker without a daemon, and the clients of SmallPlan.
#pragma once

#include <catch2/catch.hpp>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "daemon/transport/shm/shm_transport.h"
#include "daemon/transport/socket/socket_wire.h"
#include "daemon/transport/wire/host_stage.h"
#include "daemon/worker/worker_core.h"
#include "tests/unit/worker/worker_testing.h"

namespace weightd::testing {

inline constexpr char kToken[] = "secret";
inline constexpr uint64_t kPlan = 1;
inline constexpr uint64_t kEngineW = 0;  // byte offsets of the engine's parameters
inline constexpr uint64_t kEngineB = 128;
inline constexpr uint64_t kEnginePad = 192;

/// A worker with two actors and one engine rank of SmallPlan, all attached, and its plan loaded.
struct WorkerFixture {
  explicit WorkerFixture(std::unique_ptr<Transport> transport =
                             std::make_unique<ShmTransport>(ShmOptions{.num_threads = 2}),
                         const std::string& device = kHostDevice) {
    WorkerCore::Options options;
    options.device = device;
    options.members.socket_path = path;
    options.num_threads = 1;
    StatusOr<std::unique_ptr<WorkerCore>> created =
        WorkerCore::Create(options,
                           {std::move(transport),
                            std::make_unique<ShmTransport>(ShmOptions{.num_threads = 2}), Wires()},
                           [this](v1::WorkerReport report) { reports.Add(std::move(report)); });
    REQUIRE(created.ok());
    core = *std::move(created);
    for (int i = 0; i < 32; ++i) shard(i / 16)[i % 16] = 0.5f * static_cast<float>(i) + 1.0f;
    for (int i = 0; i < 4; ++i) bias(0)[i] = bias(1)[i] = -static_cast<float>(i);
    std::memset(engine_memory.as<char>(), 0x77, engine_memory.size_bytes());
  }

  static std::unique_ptr<WireTransport> Wires() {
    return std::make_unique<WireTransport>(std::make_unique<SocketWireMaker>(),
                                           std::make_unique<HostStage>());
  }

  float* shard(int rank) { return actor_memory[rank].as<float>(); }
  float* bias(int rank) { return actor_memory[rank].as<float>() + 16; }
  float* engine_b() { return engine_memory.as<float>() + kEngineB / 4; }
  float* engine_pad() { return engine_memory.as<float>() + kEnginePad / 4; }
  float EngineW(int i) {
    const uint32_t bits = static_cast<uint32_t>(engine_memory.as<uint16_t>()[i]) << 16;
    float value = 0;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

  void Expect(uint64_t member, bool writable, const std::string& label) {
    v1::WorkerCommand command;
    command.mutable_expect()->set_member(member);
    command.mutable_expect()->set_token(kToken);
    command.mutable_expect()->set_writable(writable);
    command.mutable_expect()->set_label(label);
    core->Handle(std::move(command));
  }
  std::unique_ptr<FakeClient> Attach(uint64_t member, const SharedBuffer* buffer,
                                     const std::vector<v1::MemoryBinding>& bindings,
                                     bool wants_ring = false) {
    auto client = std::make_unique<FakeClient>(path, member, kToken, wants_ring);
    REQUIRE(client->Next().has_attached());
    if (buffer != nullptr) client->Offer(0, *buffer);
    client->Bind(bindings);
    REQUIRE(reports.TakeAttached(member).has_value());
    return client;
  }
  std::vector<v1::MemoryBinding> ActorBindings() const {
    return {MakeBinding(0, 0, 0, {4, 4}, v1::DTYPE_FLOAT32),
            MakeBinding(1, 0, 64, {4}, v1::DTYPE_FLOAT32)};
  }
  std::vector<v1::MemoryBinding> EngineBindings() const {
    return {MakeBinding(0, 0, kEngineW, {8, 4}, v1::DTYPE_BFLOAT16),
            MakeBinding(1, 0, kEngineB, {4}, v1::DTYPE_FLOAT32),
            MakeBinding(2, 0, kEnginePad, {3}, v1::DTYPE_FLOAT32)};
  }
  void AttachAll() {
    Expect(kActor0, false, "actor 0");
    Expect(kActor1, false, "actor 1");
    Expect(kEngine, true, "engine e0 tp 0");
    actors[0] = Attach(kActor0, &actor_memory[0], ActorBindings());
    actors[1] = Attach(kActor1, &actor_memory[1], ActorBindings());
    engine = Attach(kEngine, &engine_memory, EngineBindings());
  }
  v1::PlanLoaded Load(const PlanInput& plan) {
    for (v1::PlanPage& page : PagesOf(plan, kPlan)) {
      v1::WorkerCommand command;
      *command.mutable_plan() = std::move(page);
      core->Handle(std::move(command));
    }
    const auto loaded = reports.TakePlan();
    REQUIRE(loaded.has_value());
    return *loaded;
  }
  /// Of transfers that begin from now on.
  uint64_t wire = 0;
  milliseconds turn_deadline{0};
  bool follows = false;  ///< of verifications that begin from now on
  /// To the verification of the last attempt.
  void Landed(uint32_t writes) {
    v1::WorkerCommand command;
    v1::Landed& landed = *command.mutable_landed();
    landed.mutable_attempt()->set_epoch(1);
    landed.mutable_attempt()->set_counter(attempts);
    landed.set_round(round);
    landed.set_writes(writes);
    core->Handle(std::move(command));
  }
  void Start(v1::Step step, const std::vector<uint64_t>& peers = {}, uint64_t version = 1,
             uint64_t deadline_us = 0) {
    v1::WorkerCommand command;
    v1::RunStep& run = *command.mutable_run();
    run.mutable_attempt()->set_epoch(1);
    run.mutable_attempt()->set_counter(++attempts);
    run.set_step(step);
    run.set_plan(kPlan);
    if (step != v1::STEP_CHECK_REPLICAS) run.add_targets(0);
    run.mutable_peers()->Add(peers.begin(), peers.end());
    run.set_version(version);
    run.set_deadline_us(deadline_us);
    run.set_round(round);
    run.set_wire(wire);
    run.set_turn_deadline_us(static_cast<uint64_t>(turn_deadline.count()) * 1000);
    run.set_follows(follows && step == v1::STEP_VERIFY);
    core->Handle(std::move(command));
  }
  v1::StepDone Run(v1::Step step, const std::vector<uint64_t>& peers = {}, uint64_t version = 1) {
    Start(step, peers, version);
    return Done();
  }
  v1::StepDone Done() {
    const auto done = reports.TakeDone();
    REQUIRE(done.has_value());
    CHECK(done->attempt().counter() == attempts);
    return *done;
  }
  void CancelCurrent() {
    v1::WorkerCommand command;
    command.mutable_cancel()->mutable_attempt()->set_epoch(1);
    command.mutable_cancel()->mutable_attempt()->set_counter(attempts);
    core->Handle(std::move(command));
  }
  void Forget(uint64_t member) {
    v1::WorkerCommand command;
    command.mutable_forget()->set_member(member);
    core->Handle(std::move(command));
  }

  TempDir dir;
  const std::string path = dir.path("worker.sock");
  Reports reports;
  SharedBuffer actor_memory[2] = {SharedBuffer(4096), SharedBuffer(4096)};
  SharedBuffer engine_memory{4096};
  std::unique_ptr<FakeClient> actors[2];
  std::unique_ptr<FakeClient> engine;
  uint64_t attempts = 0;
  uint32_t round = 0;  ///< of the steps to come
  std::unique_ptr<WorkerCore> core;
};

}  // namespace weightd::testing
