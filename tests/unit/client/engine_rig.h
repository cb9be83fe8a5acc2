// An engine rank against a daemon and a worker of the test's own.
#pragma once

#include <catch2/catch.hpp>
#include <memory>
#include <string>

#include "tests/unit/client/client_testing.h"
#include "tests/unit/client/fake_daemon.h"

namespace weightd::testing {

/// A daemon, not started yet, and a worker for one engine rank.
struct EngineRig {
  TempDir dir;
  FakeWorker worker{dir.path() + "/worker.sock", "secret"};
  std::unique_ptr<FakeDaemon> daemon = NewDaemon();
  SharedFloats memory{16};
  size_t from = 0;

  std::unique_ptr<FakeDaemon> NewDaemon() {
    return std::make_unique<FakeDaemon>(dir.path() + "/daemon.sock", &worker);
  }

  EnginePtr Open(bool auto_quiesce, int timeout_ms = 20'000) {
    const std::string address = daemon->address();
    const weightd_engine_options options{.address = address.c_str(),
                                         .model = "m",
                                         .engine = "e0",
                                         .tp_rank = 1,
                                         .tp_size = 2,
                                         .architecture = "LlamaForCausalLM",
                                         .profile = "vllm-0.32",
                                         .config_json = "{}",
                                         .auto_quiesce = auto_quiesce ? 1 : 0,
                                         .connect_timeout_ms = timeout_ms};
    weightd_engine* engine = nullptr;
    const ErrorPtr error(weightd_engine_open(&options, &engine));
    INFO(Field(error, "message"));
    REQUIRE(error == nullptr);
    return EnginePtr(engine);
  }

  weightd_param Param() const {
    weightd_param param{};
    param.name = "weight";
    param.dtype = 1;
    param.num_dims = 1;
    param.shape[0] = 16;
    param.kind = 1;
    param.memory = memory.Memory();
    return param;
  }

  ErrorPtr TryRegister(const EnginePtr& engine) {
    const weightd_param param = Param();
    return ErrorPtr(weightd_engine_register(engine.get(), &param, 1));
  }

  EnginePtr Registered(bool auto_quiesce) {
    daemon->Start();
    EnginePtr engine = Open(auto_quiesce);
    const ErrorPtr error = TryRegister(engine);
    INFO(Field(error, "message"));
    REQUIRE(error == nullptr);
    return engine;
  }

  template <typename Wanted>
  v1::EngineRequest Await(Wanted wanted) {
    v1::EngineRequest request;
    REQUIRE(daemon->engine.Await(&from, wanted, &request));
    return request;
  }
  v1::EngineQuiesced AwaitQuiesced() {
    return Await([](const auto& r) { return r.has_quiesced(); }).quiesced();
  }
  v1::EngineCommitted AwaitCommitted() {
    return Await([](const auto& r) { return r.has_committed(); }).committed();
  }
  v1::EngineHello AwaitHello() {
    return Await([](const auto& r) { return r.has_hello(); }).hello();
  }

  void Prepare(uint64_t counter, uint64_t version) {
    v1::EngineEvent event;
    event.mutable_prepare()->mutable_attempt()->set_epoch(1);
    event.mutable_prepare()->mutable_attempt()->set_counter(counter);
    event.mutable_prepare()->set_version(version);
    REQUIRE(daemon->engine.Send(event));
  }
  void Commit(uint64_t counter, uint64_t version) {
    v1::EngineEvent event;
    event.mutable_commit()->mutable_attempt()->set_epoch(1);
    event.mutable_commit()->mutable_attempt()->set_counter(counter);
    event.mutable_commit()->set_version(version);
    REQUIRE(daemon->engine.Send(event));
  }
  void Outcome(uint64_t counter, v1::EngineState state, bool untouched) {
    v1::EngineEvent event;
    event.mutable_outcome()->mutable_attempt()->set_epoch(1);
    event.mutable_outcome()->mutable_attempt()->set_counter(counter);
    event.mutable_outcome()->set_state(state);
    event.mutable_outcome()->set_untouched(untouched);
    REQUIRE(daemon->engine.Send(event));
  }
};

/// Waits until the engine's state satisfies `wanted`.
template <typename Wanted>
nlohmann::json AwaitState(const EnginePtr& engine, Wanted wanted) {
  const Clock::time_point deadline = Clock::now() + kPatience;
  uint64_t seen = 0;
  while (true) {
    seen = weightd_engine_wait(engine.get(), seen, 1000);
    nlohmann::json state = TakeJson(weightd_engine_state(engine.get()));
    if (wanted(state)) return state;
    INFO(state.dump());
    REQUIRE(Clock::now() < deadline);
  }
}

}  // namespace weightd::testing
