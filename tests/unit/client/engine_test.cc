#include <catch2/catch.hpp>

#include "tests/unit/client/engine_rig.h"

namespace weightd::testing {
using nlohmann::json;

TEST_CASE("an engine that nobody reads is prepared and committed without its caller") {
  EngineRig rig;
  const EnginePtr engine = rig.Registered(true);
  const v1::EngineHello hello = rig.AwaitHello();
  CHECK(hello.coordinates().tp_rank() == 1);
  CHECK(hello.num_ranks() == 2);
  CHECK_FALSE(hello.incarnation().empty());
  CHECK(rig.worker.bindings().at(0).extent(0) == 16);

  rig.Prepare(1, 7);
  CHECK_FALSE(rig.AwaitQuiesced().has_error());
  json state = TakeJson(weightd_engine_state(engine.get()));
  CHECK(state["dirty"] == true);
  CHECK(state["state"] == "STAGING");
  rig.Commit(1, 7);
  CHECK_FALSE(rig.AwaitCommitted().has_error());
  rig.Outcome(1, v1::ENGINE_STATE_SERVING, false);
  state = AwaitState(engine, [](const json& s) { return s["state"] == "SERVING"; });
  CHECK(state["version"] == 7);
  CHECK(state["dirty"] == false);
  CHECK(state["attempt"] == "1.1");
}

TEST_CASE("a trace is announced with the registration that it belongs to") {
  EngineRig rig;
  rig.daemon->Start();
  const EnginePtr engine = rig.Open(true);
  weightd_param param = rig.Param();
  const weightd_traced_source source{.name = "w", .num_dims = 1, .shape = {40}};
  const weightd_traced_write writes[] = {
      {.param = 0, .source = 0, .extent = {12}, .source_origin = {5}, .source_dim = {0}},
      {.param = 0, .source = -1, .target_origin = {12}, .extent = {4}}};
  const weightd_trace trace{&source, 1, writes, 2, 1};
  REQUIRE(weightd_engine_register_traced(engine.get(), &param, 1, &trace) == nullptr);
  const v1::TracePage page = rig.Await([](const auto& r) { return r.has_trace(); }).trace();
  CHECK(page.sources(0).shape(0) == 40);
  CHECK(page.writes(0).source_origin(0) == 5);
  CHECK(page.writes(1).zero_fill());
  const v1::EngineRegister last =
      rig.Await([](const auto& r) { return r.has_register_(); }).register_();
  CHECK(last.num_traced_sources() == 1);
  CHECK(last.num_traced_writes() == 2);
  CHECK(last.prefer_trace());
}

TEST_CASE("the caller answers prepare and commit when it asked for that") {
  EngineRig rig;
  const EnginePtr engine = rig.Registered(false);
  const ErrorPtr early(weightd_engine_quiesced(engine.get(), nullptr));
  CHECK(weightd_error_code(early.get()) == 9);

  rig.Prepare(1, 7);
  json state = AwaitState(engine, [](const json& s) { return s["pending"] == "prepare"; });
  CHECK(state["dirty"] == true);
  REQUIRE(weightd_engine_quiesced(engine.get(), nullptr) == nullptr);
  CHECK(rig.AwaitQuiesced().attempt().counter() == 1);
  rig.Commit(1, 7);
  AwaitState(engine, [](const json& s) { return s["pending"] == "commit"; });
  REQUIRE(weightd_engine_committed(engine.get(), "prefix,encoder", nullptr) == nullptr);
  const v1::EngineCommitted committed = rig.AwaitCommitted();
  REQUIRE(committed.caches_reset_size() == 2);
  CHECK(committed.caches_reset(1) == "encoder");
  CHECK(TakeJson(weightd_engine_state(engine.get()))["version"] == 7);
}

TEST_CASE("an engine that cannot be quiesced stays clean") {
  EngineRig rig;
  const EnginePtr engine = rig.Registered(false);
  rig.Prepare(1, 7);
  AwaitState(engine, [](const json& s) { return s["pending"] == "prepare"; });
  REQUIRE(weightd_engine_quiesced(engine.get(), "scheduler is stuck") == nullptr);
  const v1::EngineQuiesced answer = rig.AwaitQuiesced();
  CHECK(answer.error().reason() == "ENGINE_REFUSED");
  CHECK(answer.error().message() == "scheduler is stuck");
  CHECK(answer.error().rank() == "engine e0 tp 1");
  rig.Outcome(1, v1::ENGINE_STATE_REGISTERED, true);
  AwaitState(engine, [](const json& s) { return s["dirty"] == false; });
}

TEST_CASE("a torn engine shows that it is poisoned") {
  EngineRig rig;
  const EnginePtr engine = rig.Registered(true);
  rig.Prepare(1, 7);
  rig.AwaitQuiesced();
  rig.Outcome(1, v1::ENGINE_STATE_POISONED, false);
  const json state = AwaitState(engine, [](const json& s) { return s["state"] == "POISONED"; });
  CHECK(state["dirty"] == true);
}

TEST_CASE("an engine sees what is offered to it, and when nothing is coming") {
  EngineRig rig;
  const EnginePtr engine = rig.Registered(false);
  json state = TakeJson(weightd_engine_state(engine.get()));
  CHECK(state["offered"] == 0);
  CHECK(state["idle"] == json{{"count", 0}, {"version", 0}, {"error", nullptr}});
  rig.Prepare(1, 7);
  AwaitState(engine, [](const json& s) { return s["offered"] == 7; });
  rig.Outcome(1, v1::ENGINE_STATE_REGISTERED, true);
  AwaitState(engine, [](const json& s) { return s["offered"] == 0; });
  v1::EngineEvent event;
  event.mutable_idle()->set_version(8);
  event.mutable_idle()->mutable_error()->set_code(4);
  event.mutable_idle()->mutable_error()->set_reason("DEADLINE");
  REQUIRE(rig.daemon->engine.Send(event));
  state = AwaitState(engine, [](const json& s) { return s["idle"]["count"] == 1; });
  CHECK(state["idle"]["version"] == 8);
  CHECK(state["idle"]["error"]["reason"] == "DEADLINE");
}

TEST_CASE("an older attempt is refused") {
  EngineRig rig;
  const EnginePtr engine = rig.Registered(true);
  rig.Prepare(5, 7);
  CHECK_FALSE(rig.AwaitQuiesced().has_error());
  rig.Prepare(4, 9);
  const v1::EngineQuiesced answer = rig.AwaitQuiesced();
  CHECK(answer.attempt().counter() == 4);
  CHECK(answer.error().reason() == "FENCED");
  CHECK(TakeJson(weightd_engine_state(engine.get()))["attempt"] == "1.5");
}

TEST_CASE("an engine reports its truth to a new daemon only when no worker maps its memory") {
  EngineRig rig;
  const EnginePtr engine = rig.Registered(true);
  rig.AwaitHello();
  rig.Prepare(3, 7);
  rig.AwaitQuiesced();
  rig.worker.HoldUnmapping(true);
  rig.daemon->Stop();
  const json lost = AwaitState(engine, [](const json& s) { return s["state"] == "POISONED"; });
  CHECK(lost["connected"] == false);
  CHECK(lost["error"]["reason"] == "DAEMON_LOST");

  rig.daemon = rig.NewDaemon();
  rig.daemon->Start();
  rig.from = 0;
  REQUIRE(rig.worker.AwaitEnded(1));  // the client let go, the worker has not confirmed
  CHECK(rig.daemon->engine.requests().empty());
  rig.worker.HoldUnmapping(false);
  const v1::EngineHello hello = rig.AwaitHello();
  CHECK(hello.dirty());
  CHECK(hello.held_attempt().counter() == 3);
  CHECK(hello.held_version() == 0);
  CHECK(rig.worker.AwaitBound(2));
}

TEST_CASE("an engine may start before its daemon") {
  EngineRig rig;
  const EnginePtr engine = rig.Open(true, -1);
  REQUIRE(rig.TryRegister(engine) == nullptr);
  CHECK(TakeJson(weightd_engine_state(engine.get()))["registered"] == false);
  rig.daemon->Start();
  AwaitState(engine, [](const json& s) { return s["registered"] == true; });
}

TEST_CASE("what the daemon refuses is the error of the registration") {
  EngineRig rig;
  rig.daemon->engine.on_request = [&rig](const v1::EngineRequest& request) {
    v1::EngineEvent event;
    if (request.has_hello()) event.mutable_welcome()->mutable_protocol()->set_major(1);
    if (request.has_register_()) {
      event.mutable_error()->mutable_detail()->set_code(5);
      event.mutable_error()->mutable_detail()->set_reason("UNKNOWN_ARCHITECTURE");
    }
    if (event.event_case() != v1::EngineEvent::EVENT_NOT_SET) rig.daemon->engine.Send(event);
  };
  rig.daemon->Start();
  const EnginePtr engine = rig.Open(true);
  const ErrorPtr error = rig.TryRegister(engine);
  REQUIRE(error != nullptr);
  CHECK(weightd_error_code(error.get()) == 5);
  CHECK(Field(error, "reason") == "UNKNOWN_ARCHITECTURE");
}

TEST_CASE("a registration in the background takes the place of one that was refused") {
  EngineRig rig;
  rig.daemon->engine.on_request = [&rig, seen = 0](const v1::EngineRequest& request) mutable {
    v1::EngineEvent event;
    if (request.has_hello()) event.mutable_welcome()->mutable_protocol()->set_major(1);
    if (request.has_register_() && ++seen == 1) {
      event.mutable_error()->mutable_detail()->set_code(5);
      event.mutable_error()->mutable_detail()->set_reason("UNKNOWN_ARCHITECTURE");
    } else if (request.has_register_()) {
      *event.mutable_registered()->mutable_worker() = rig.worker.Endpoint();
    }
    if (event.event_case() != v1::EngineEvent::EVENT_NOT_SET) rig.daemon->engine.Send(event);
  };
  rig.daemon->Start();
  const EnginePtr engine = rig.Open(true, -1);
  REQUIRE(rig.TryRegister(engine) == nullptr);
  AwaitState(engine, [](const json& s) {
    return s["error"].is_object() && s["error"]["reason"] == "UNKNOWN_ARCHITECTURE";
  });
  REQUIRE(rig.TryRegister(engine) == nullptr);
  CHECK(TakeJson(weightd_engine_state(engine.get()))["error"].is_null());
  AwaitState(engine, [](const json& s) { return s["registered"] == true; });
}

TEST_CASE("closing tells the daemon that the engine leaves") {
  EngineRig rig;
  EnginePtr engine = rig.Registered(true);
  engine.reset();
  rig.Await([](const auto& r) { return r.has_released(); });
  CHECK(rig.worker.AwaitEnded(1));
}

}  // namespace weightd::testing
