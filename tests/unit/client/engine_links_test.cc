// An engine rank whose memory several workers write into: one connection each.
#include "tests/unit/client/engine_rig.h"

namespace weightd::testing {
namespace {

using nlohmann::json;

bool Registered(const json& state) { return state["registered"] == true; }

void Announce(EngineRig& rig, const v1::WorkerEndpoint& endpoint) {
  v1::EngineEvent event;
  *event.mutable_worker_changed() = endpoint;
  REQUIRE(rig.daemon->engine.Send(event));
}

}  // namespace

TEST_CASE("an engine lends its memory to every worker that it is told of") {
  EngineRig rig;
  FakeWorker writer(rig.dir.path() + "/writer.sock", "secret", "host.1");
  rig.daemon->writers = {writer.Endpoint()};
  const EnginePtr engine = rig.Registered(true);
  CHECK(rig.worker.bindings().size() == 1);
  CHECK(writer.bindings().size() == 1);
  CHECK(writer.TakeSegments().size() == 1);
  CHECK(TakeJson(weightd_engine_state(engine.get()))["worker"] == "host");
}

TEST_CASE("a worker that is announced later gets the memory; the first keeps it") {
  EngineRig rig;
  const EnginePtr engine = rig.Registered(true);
  FakeWorker writer(rig.dir.path() + "/writer.sock", "secret", "host.1");
  Announce(rig, writer.Endpoint());
  REQUIRE(writer.AwaitBound(1));
  AwaitState(engine, Registered);
  CHECK(rig.worker.ended() == 0);
}

TEST_CASE("a worker of another device that dies is attached to again; the others keep the memory") {
  EngineRig rig;
  FakeWorker writer(rig.dir.path() + "/writer.sock", "secret", "host.1");
  rig.daemon->writers = {writer.Endpoint()};
  const EnginePtr engine = rig.Registered(true);
  writer.Drop();
  const json lost =
      AwaitState(engine, [](const json& state) { return state["registered"] == false; });
  CHECK(lost["error"]["reason"] == "WORKER_LOST");
  CHECK(lost["error"]["peer"] == "worker host.1");
  CHECK(lost["worker"] == "host");
  FakeWorker second(rig.dir.path() + "/second.sock", "secret", "host.1");
  Announce(rig, second.Endpoint());
  REQUIRE(second.AwaitBound(1));
  AwaitState(engine, Registered);
  CHECK(rig.worker.ended() == 0);
}

TEST_CASE("a worker of another device that is not running keeps nobody waiting") {
  EngineRig rig;
  v1::WorkerEndpoint away;
  away.set_device("host.1");
  rig.daemon->writers = {away};
  const EnginePtr engine = rig.Registered(true);
  FakeWorker writer(rig.dir.path() + "/writer.sock", "secret", "host.1");
  Announce(rig, writer.Endpoint());
  REQUIRE(writer.AwaitBound(1));
  AwaitState(engine, Registered);
}

TEST_CASE("a worker of another device that refuses the memory fails the registration") {
  EngineRig rig;
  FakeWorker writer(rig.dir.path() + "/writer.sock", "secret", "host.1");
  v1::ErrorDetail refusal;
  refusal.set_code(8);
  refusal.set_reason("SHARED_MEMORY");
  writer.RefuseWith(refusal);
  rig.daemon->writers = {writer.Endpoint()};
  rig.daemon->Start();
  const EnginePtr engine = rig.Open(true);
  const ErrorPtr error = rig.TryRegister(engine);
  REQUIRE(error != nullptr);
  CHECK(Field(error, "reason") == "SHARED_MEMORY");
  CHECK(Field(error, "peer") == "worker host.1");
  CHECK(rig.worker.AwaitEnded(1));  // nothing stays lent
}

TEST_CASE("the truth is reported to a new daemon only when no worker of any device maps it") {
  EngineRig rig;
  FakeWorker writer(rig.dir.path() + "/writer.sock", "secret", "host.1");
  rig.daemon->writers = {writer.Endpoint()};
  const EnginePtr engine = rig.Registered(true);
  writer.HoldUnmapping(true);
  rig.daemon->Stop();
  AwaitState(engine, [](const json& state) { return state["connected"] == false; });
  rig.daemon = rig.NewDaemon();
  rig.daemon->Start();
  rig.from = 0;
  REQUIRE(rig.worker.AwaitEnded(1));
  REQUIRE(writer.AwaitEnded(1));  // the client let go, this worker has not confirmed
  CHECK(rig.daemon->engine.requests().empty());
  writer.HoldUnmapping(false);
  rig.AwaitHello();
  CHECK(rig.worker.AwaitBound(2));
}

}  // namespace weightd::testing
