// A trainer rank against a daemon and a worker of the test's own.
#pragma once

#include <catch2/catch.hpp>
#include <string>
#include <vector>

#include "tests/unit/client/client_testing.h"
#include "tests/unit/client/fake_daemon.h"

namespace weightd::testing {

/// A daemon, not started yet, and a worker for one trainer rank.
struct ActorRig {
  TempDir dir;
  FakeWorker worker{dir.path() + "/worker.sock", "secret"};
  FakeDaemon daemon{dir.path() + "/daemon.sock", &worker};

  weightd_actor_options Options(int timeout_ms = 20'000) {
    address = daemon.address();
    return {.address = address.c_str(),
            .model = "m",
            .group = "g",
            .group_order = 5,
            .rank = 1,
            .world_size = 2,
            .connect_timeout_ms = timeout_ms};
  }

  ActorPtr Open(int timeout_ms = 20'000) {
    const weightd_actor_options options = Options(timeout_ms);
    weightd_actor* actor = nullptr;
    const ErrorPtr error(weightd_actor_open(&options, &actor));
    INFO(Field(error, "message"));
    REQUIRE(error == nullptr);
    return ActorPtr(actor);
  }

  std::string address;
};

inline void Register(weightd_actor* actor, std::vector<weightd_tensor> tensors) {
  const ErrorPtr error(weightd_actor_register(actor, tensors.data(), tensors.size()));
  INFO(Field(error, "message"));
  REQUIRE(error == nullptr);
}

inline void Begin(weightd_actor* actor, weightd_sync_options options) {
  const ErrorPtr error(weightd_actor_sync_begin(actor, &options));
  INFO(Field(error, "message"));
  REQUIRE(error == nullptr);
}

/// The result of the sync that runs; exactly one of the two is set.
struct Ended {
  nlohmann::json result;
  ErrorPtr error;
};
inline Ended Wait(weightd_actor* actor) {
  char* json = nullptr;
  weightd_error* error = nullptr;
  REQUIRE(weightd_actor_sync_wait(actor, 30'000, &json, &error) == 1);
  return {json == nullptr ? nlohmann::json() : TakeJson(json), ErrorPtr(error)};
}

inline bool IsSync(const v1::ActorRequest& request) { return request.has_sync(); }

/// Memory that cannot be lent.
inline weightd_memory Unlent(const void* address) {
  weightd_memory memory{};
  memory.fd = -1;
  memory.address = address;
  memory.strides[0] = 1;
  return memory;
}

}  // namespace weightd::testing
