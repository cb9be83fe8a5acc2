#include <unistd.h>

#include <catch2/catch.hpp>

#include "daemon/layout/table_digest.h"
#include "tests/unit/client/actor_rig.h"

namespace weightd::testing {

TEST_CASE("opening without a daemon names address and remedy") {
  ActorRig rig;
  const weightd_actor_options options = rig.Options(50);
  weightd_actor* actor = nullptr;
  const ErrorPtr error(weightd_actor_open(&options, &actor));
  REQUIRE(error != nullptr);
  CHECK(weightd_error_code(error.get()) == 14);
  CHECK(Field(error, "reason") == "DAEMON_LOST");
  CHECK(Field(error, "rank") == "actor 1");
  CHECK(Field(error, "message").find(rig.address) != std::string::npos);
  CHECK_FALSE(Field(error, "remedy").empty());
}

TEST_CASE("an address that cannot be read is refused at once") {
  ActorRig rig;
  weightd_actor_options options = rig.Options();
  options.address = "nowhere";
  weightd_actor* actor = nullptr;
  const ErrorPtr error(weightd_actor_open(&options, &actor));
  REQUIRE(error != nullptr);
  CHECK(weightd_error_code(error.get()) == 3);
}

TEST_CASE("a daemon of another protocol is refused") {
  ActorRig rig;
  rig.daemon.protocol_major = 2;
  rig.daemon.Start();
  const weightd_actor_options options = rig.Options();
  weightd_actor* actor = nullptr;
  const ErrorPtr error(weightd_actor_open(&options, &actor));
  REQUIRE(error != nullptr);
  CHECK(weightd_error_code(error.get()) == 9);
  CHECK(Field(error, "reason") == "PROTOCOL_VERSION");
}

TEST_CASE("what the daemon answers to the greeting is the caller's error") {
  ActorRig rig;
  rig.daemon.actor.on_request = [&rig](const v1::ActorRequest&) {
    v1::ActorEvent event;
    event.mutable_error()->set_fatal(true);
    event.mutable_error()->mutable_detail()->set_code(6);
    event.mutable_error()->mutable_detail()->set_reason("DUPLICATE_RANK");
    rig.daemon.actor.Send(event);
  };
  rig.daemon.Start();
  const weightd_actor_options options = rig.Options();
  weightd_actor* actor = nullptr;
  const ErrorPtr error(weightd_actor_open(&options, &actor));
  REQUIRE(error != nullptr);
  CHECK(weightd_error_code(error.get()) == 6);
  CHECK(Field(error, "reason") == "DUPLICATE_RANK");
}

TEST_CASE("registration tells the daemon the shards and lends their memory to the worker") {
  ActorRig rig;
  rig.daemon.Start();
  const SharedFloats memory(64);
  const TensorOf a("a", {8, 4}, 4, 4, memory.Memory(16, {4, 1}));
  const TensorOf b("b", {6}, 0, 3, memory.Memory(0, {2}));
  const ActorPtr actor = rig.Open();
  Register(actor.get(), {a.View(), b.View()});

  size_t from = 0;
  v1::ActorRequest request;
  REQUIRE(rig.daemon.actor.Await(
      &from, [](const auto& r) { return r.has_hello(); }, &request));
  CHECK(request.hello().rank() == 1);
  CHECK(request.hello().world_size() == 2);
  CHECK(request.hello().group() == "g");
  REQUIRE(rig.daemon.actor.Await(
      &from, [](const auto& r) { return r.has_shards(); }, &request));
  CHECK(request.shards().last());
  CHECK(request.shards().boxes_size() == 2);
  REQUIRE(rig.daemon.actor.Await(
      &from, [](const auto& r) { return r.has_register_(); }, &request));
  const auto digest =
      CanonicalTableDigest({{"a", {8, 4}, DType::kFloat32}, {"b", {6}, DType::kFloat32}});
  CHECK(request.register_().table_digest() == std::string(digest.begin(), digest.end()));
  CHECK_FALSE(request.register_().staged());
  REQUIRE(rig.daemon.actor.Await(
      &from, [](const auto& r) { return r.has_table(); }, &request));
  CHECK(request.table().tensors_size() == 2);

  const std::vector<v1::MemoryBinding> bindings = rig.worker.bindings();
  REQUIRE(bindings.size() == 2);
  CHECK(bindings[0].offset_bytes() == 64);
  CHECK(bindings[1].strides(0) == 2);
  CHECK(bindings[1].extent(0) == 3);
  const std::vector<ScopedFd> segments = rig.worker.TakeSegments();
  REQUIRE(segments.size() == 1);
  float element = 0;
  REQUIRE(::pread(segments[0].get(), &element, sizeof(element), 64) == sizeof(element));
  CHECK(element == memory.data[16]);
  CHECK(TakeJson(weightd_actor_state(actor.get()))["registered"] == true);
}

TEST_CASE("the table travels only when it is wanted") {
  ActorRig rig;
  rig.daemon.wants_table = false;
  rig.daemon.Start();
  const SharedFloats memory(8);
  const TensorOf a("a", {8}, 0, 8, memory.Memory());
  const ActorPtr actor = rig.Open();
  Register(actor.get(), {a.View()});
  for (const v1::ActorRequest& request : rig.daemon.actor.requests()) {
    CHECK_FALSE(request.has_table());
  }
}

TEST_CASE("a worker that refuses the memory fails the registration, which can be repeated") {
  ActorRig rig;
  rig.daemon.Start();
  v1::ErrorDetail detail;
  detail.set_code(3);
  detail.set_reason("MEMORY_MOVED");
  rig.worker.RefuseWith(detail);
  const SharedFloats memory(8);
  const TensorOf a("a", {8}, 0, 8, memory.Memory());
  const weightd_tensor tensor = a.View();
  const ActorPtr actor = rig.Open();
  const ErrorPtr error(weightd_actor_register(actor.get(), &tensor, 1));
  REQUIRE(error != nullptr);
  CHECK(Field(error, "reason") == "MEMORY_MOVED");
  weightd_sync_options sync{.version = 1};
  const ErrorPtr unregistered(weightd_actor_sync_begin(actor.get(), &sync));
  CHECK(weightd_error_code(unregistered.get()) == 9);
  rig.worker.RefuseWith({});
  Register(actor.get(), {tensor});
}

TEST_CASE("a worker that dies is attached to again when the daemon says where") {
  ActorRig rig;
  rig.daemon.Start();
  const SharedFloats memory(8);
  const TensorOf a("a", {8}, 0, 8, memory.Memory());
  const ActorPtr actor = rig.Open();
  Register(actor.get(), {a.View()});
  FakeWorker second(rig.dir.path() + "/worker2.sock", "other");
  rig.worker.Drop();
  REQUIRE(rig.worker.AwaitEnded(1));
  v1::ActorEvent event;
  *event.mutable_worker_changed() = second.Endpoint();
  REQUIRE(rig.daemon.actor.Send(event));
  REQUIRE(second.AwaitBound(1));
  CHECK(second.TakeSegments().size() == 1);
  Begin(actor.get(), {.version = 3});
  CHECK(Wait(actor.get()).error == nullptr);
}

TEST_CASE("closing waits until the worker has let go") {
  ActorRig rig;
  rig.daemon.Start();
  const SharedFloats memory(8);
  const TensorOf a("a", {8}, 0, 8, memory.Memory());
  ActorPtr actor = rig.Open();
  Register(actor.get(), {a.View()});
  actor.reset();
  CHECK(rig.worker.AwaitEnded(1));
  CHECK(rig.daemon.actor.AwaitClosed(1));
}

}  // namespace weightd::testing
