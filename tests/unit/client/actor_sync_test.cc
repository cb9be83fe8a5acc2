#include <catch2/catch.hpp>
#include <cstring>
#include <numeric>
#include <thread>

#include "tests/unit/client/actor_rig.h"

namespace weightd::testing {

TEST_CASE("a sync returns the daemon's result") {
  ActorRig rig;
  rig.daemon.on_sync = [&rig](const v1::ActorSync& sync) {
    v1::ActorEvent event;
    v1::SyncResult* result = event.mutable_result();
    result->set_request(sync.request() + 1);  // of another request: ignored
    rig.daemon.actor.Send(event);
    result->set_request(sync.request());
    result->set_version(sync.version());
    result->set_bytes(1234);
    result->mutable_attempt()->set_epoch(3);
    result->mutable_attempt()->set_counter(9);
    v1::PhaseTime* time = result->add_phases();
    time->set_phase(v1::PHASE_RESOLVE_LAYOUTS);
    time->set_duration_us(77);
    v1::ReplicaOutcome* replica = result->add_replicas();
    replica->set_engine("e0");
    replica->set_committed(true);
    replica->set_state(v1::ENGINE_STATE_SERVING);
    replica->add_caches_reset("prefix");
    rig.daemon.actor.Send(event);
  };
  rig.daemon.Start();
  const SharedFloats memory(8);
  const TensorOf a("a", {8}, 0, 8, memory.Memory());
  const ActorPtr actor = rig.Open();
  Register(actor.get(), {a.View()});
  Begin(actor.get(), {.version = 42, .require_replicas = 2, .check_replicas = 1});
  const Ended ended = Wait(actor.get());
  REQUIRE(ended.error == nullptr);
  CHECK(ended.result["version"] == 42);
  CHECK(ended.result["attempt"] == "3.9");
  CHECK(ended.result["bytes"] == 1234);
  CHECK(ended.result["phases"]["resolve_layouts"] == 77);
  CHECK(ended.result["replicas"][0]["state"] == "SERVING");
  CHECK(ended.result["replicas"][0]["caches_reset"][0] == "prefix");
  CHECK(ended.result["replicas"][0]["error"].is_null());
  size_t from = 0;
  v1::ActorRequest request;
  REQUIRE(rig.daemon.actor.Await(&from, &IsSync, &request));
  CHECK(request.sync().require_replicas() == 2);
  CHECK(request.sync().check_replicas());
}

TEST_CASE("a failed sync carries the outcome of every replica") {
  ActorRig rig;
  rig.daemon.on_sync = [&rig](const v1::ActorSync& sync) {
    v1::ActorEvent event;
    event.mutable_result()->set_request(sync.request());
    event.mutable_result()->mutable_error()->set_code(10);
    event.mutable_result()->mutable_error()->set_reason("PEER_LOST");
    event.mutable_result()->mutable_error()->set_tensor("layers.3");
    event.mutable_result()->add_replicas()->set_engine("e7");
    rig.daemon.actor.Send(event);
  };
  rig.daemon.Start();
  const SharedFloats memory(8);
  const TensorOf a("a", {8}, 0, 8, memory.Memory());
  const ActorPtr actor = rig.Open();
  Register(actor.get(), {a.View()});
  Begin(actor.get(), {.version = 1});
  const Ended ended = Wait(actor.get());
  REQUIRE(ended.error != nullptr);
  CHECK(weightd_error_code(ended.error.get()) == 10);
  CHECK(Field(ended.error, "tensor") == "layers.3");
  CHECK(nlohmann::json::parse(Field(ended.error, "result"))["replicas"][0]["engine"] == "e7");
}

TEST_CASE("a sync of a daemon that dies ends with the phase, and the client comes back") {
  ActorRig rig;
  rig.daemon.on_sync = [&rig](const v1::ActorSync& sync) {
    v1::ActorEvent event;
    event.mutable_progress()->set_request(sync.request());
    event.mutable_progress()->set_phase(v1::PHASE_TRANSFER);
    rig.daemon.actor.Send(event);
  };
  rig.daemon.Start();
  const SharedFloats memory(8);
  const TensorOf a("a", {8}, 0, 8, memory.Memory());
  const ActorPtr actor = rig.Open();
  Register(actor.get(), {a.View()});
  Begin(actor.get(), {.version = 1});
  while (TakeJson(weightd_actor_state(actor.get()))["phase"] != "transfer") {
    std::this_thread::sleep_for(milliseconds(1));
  }
  rig.daemon.Stop();
  const Ended lost = Wait(actor.get());
  REQUIRE(lost.error != nullptr);
  CHECK(weightd_error_code(lost.error.get()) == 14);
  CHECK(Field(lost.error, "reason") == "DAEMON_LOST");
  CHECK(Field(lost.error, "phase") == "transfer");
  CHECK(Field(lost.error, "peer").find(rig.address) != std::string::npos);

  Begin(actor.get(), {.version = 2});  // waits for the daemon's return
  FakeDaemon second(rig.dir.path() + "/daemon.sock", &rig.worker);
  second.Start();
  const Ended ended = Wait(actor.get());
  INFO(Field(ended.error, "message"));
  REQUIRE(ended.error == nullptr);
  CHECK(ended.result["version"] == 2);
  CHECK(rig.worker.AwaitBound(2));
}

TEST_CASE("a sync without a daemon reports why once its wait is over") {
  ActorRig rig;
  rig.daemon.Start();
  const SharedFloats memory(8);
  const TensorOf a("a", {8}, 0, 8, memory.Memory());
  const ActorPtr actor = rig.Open(300);
  Register(actor.get(), {a.View()});
  rig.daemon.Stop();
  Begin(actor.get(), {.version = 1});
  const Ended ended = Wait(actor.get());
  REQUIRE(ended.error != nullptr);
  CHECK(weightd_error_code(ended.error.get()) == 14);
  CHECK(Field(ended.error, "reason") == "DAEMON_LOST");
}

TEST_CASE("staged shards are copied into the ring during their sync only") {
  ActorRig rig;
  rig.daemon.on_sync = [](const v1::ActorSync&) {};
  rig.daemon.Start();
  std::vector<float> matrix(24);
  std::iota(matrix.begin(), matrix.end(), 100.0f);
  TensorOf a("a", {4, 6}, 0, 4, Unlent(nullptr));
  const ActorPtr actor = rig.Open();
  Register(actor.get(), {a.View()});
  v1::RingFill fill;
  fill.set_slot(1);
  fill.mutable_part()->add_origin(1);
  fill.mutable_part()->add_origin(2);
  fill.mutable_part()->add_extent(2);
  fill.mutable_part()->add_extent(3);
  CHECK(rig.worker.Fill(fill).error().reason() == "MISSING_TENSOR");

  const weightd_staged staged{.address = matrix.data(), .strides = {1, 4}};  // a transposed view
  Begin(actor.get(), {.version = 1, .staged = &staged, .num_staged = 1});
  size_t from = 0;
  v1::ActorRequest request;
  REQUIRE(rig.daemon.actor.Await(&from, &IsSync, &request));
  const v1::RingFilled filled = rig.worker.Fill(fill);
  CHECK(filled.slot() == 1);
  CHECK(filled.error().code() == 0);
  float got[6];
  std::memcpy(got, rig.worker.ring() + (1 << 15), sizeof(got));
  for (int i = 0; i < 6; ++i) {
    CHECK(got[i] == matrix[static_cast<size_t>((1 + i / 3) + 4 * (2 + i % 3))]);
  }
  fill.mutable_part()->set_extent(0, 4);
  CHECK(rig.worker.Fill(fill).error().reason() == "PROTOCOL");

  v1::ActorEvent event;
  event.mutable_result()->set_request(request.sync().request());
  rig.daemon.actor.Send(event);
  CHECK(Wait(actor.get()).error == nullptr);
  fill.mutable_part()->set_extent(0, 2);
  CHECK(rig.worker.Fill(fill).error().reason() == "MISSING_TENSOR");
}

TEST_CASE("a staged tensor without memory makes this rank refuse the sync") {
  ActorRig rig;
  rig.daemon.Start();
  const TensorOf a("lora", {4}, 0, 4, Unlent(nullptr));
  const ActorPtr actor = rig.Open();
  Register(actor.get(), {a.View()});
  Begin(actor.get(), {.version = 1});
  const Ended ended = Wait(actor.get());
  REQUIRE(ended.error != nullptr);
  CHECK(Field(ended.error, "reason") == "MISSING_TENSOR");
  CHECK(Field(ended.error, "tensor") == "lora");
  CHECK(Field(ended.error, "rank") == "actor 1");
}

TEST_CASE("the caller's refusal reaches the daemon") {
  ActorRig rig;
  rig.daemon.Start();
  const SharedFloats memory(8);
  const TensorOf a("a", {8}, 0, 8, memory.Memory());
  const ActorPtr actor = rig.Open();
  Register(actor.get(), {a.View()});
  Begin(actor.get(), {.version = 1,
                      .refuse_reason = "MEMORY_MOVED",
                      .refuse_message = "storage moved",
                      .refuse_tensor = "a",
                      .refuse_remedy = "register again"});
  const Ended ended = Wait(actor.get());
  CHECK(Field(ended.error, "reason") == "MEMORY_MOVED");
  CHECK(Field(ended.error, "remedy") == "register again");
}

TEST_CASE("a cancel reaches the daemon, and calls out of order are refused") {
  ActorRig rig;
  rig.daemon.on_sync = [](const v1::ActorSync&) {};
  rig.daemon.Start();
  const SharedFloats memory(8);
  const TensorOf a("a", {8}, 0, 8, memory.Memory());
  const ActorPtr actor = rig.Open();
  weightd_sync_options sync{.version = 1};
  const ErrorPtr early(weightd_actor_sync_begin(actor.get(), &sync));
  CHECK(weightd_error_code(early.get()) == 9);
  Register(actor.get(), {a.View()});
  Begin(actor.get(), sync);
  const ErrorPtr second(weightd_actor_sync_begin(actor.get(), &sync));
  CHECK(weightd_error_code(second.get()) == 9);
  char* json = nullptr;
  weightd_error* error = nullptr;
  CHECK(weightd_actor_sync_wait(actor.get(), 0, &json, &error) == 0);
  size_t from = 0;
  v1::ActorRequest request;
  REQUIRE(rig.daemon.actor.Await(&from, &IsSync, &request));
  weightd_actor_sync_cancel(actor.get());
  REQUIRE(rig.daemon.actor.Await(
      &from, [](const auto& r) { return r.has_cancel(); }, &request));
  v1::ActorEvent event;
  event.mutable_result()->set_request(request.cancel().request());
  event.mutable_result()->mutable_error()->set_code(1);
  rig.daemon.actor.Send(event);
  CHECK(weightd_error_code(Wait(actor.get()).error.get()) == 1);
}

TEST_CASE("a superseded trainer stays fenced") {
  ActorRig rig;
  rig.daemon.on_sync = [&rig](const v1::ActorSync&) {
    v1::ActorEvent event;
    event.mutable_error()->set_fatal(true);
    event.mutable_error()->mutable_detail()->set_code(10);
    event.mutable_error()->mutable_detail()->set_reason("FENCED");
    rig.daemon.actor.Send(event);
  };
  rig.daemon.Start();
  const SharedFloats memory(8);
  const TensorOf a("a", {8}, 0, 8, memory.Memory());
  const ActorPtr actor = rig.Open();
  Register(actor.get(), {a.View()});
  Begin(actor.get(), {.version = 1});
  CHECK(Field(Wait(actor.get()).error, "reason") == "FENCED");
  weightd_sync_options sync{.version = 2};
  const ErrorPtr error(weightd_actor_sync_begin(actor.get(), &sync));
  CHECK(Field(error, "reason") == "FENCED");
}

}  // namespace weightd::testing
