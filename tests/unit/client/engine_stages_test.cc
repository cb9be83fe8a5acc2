// Derived parameters in several stages, as the client library sees them.
#include <catch2/catch.hpp>

#include "client/src/pages.h"
#include "client/src/registration.h"
#include "tests/unit/client/engine_rig.h"

namespace weightd::testing {
using nlohmann::json;

namespace {

weightd_param Staged(const char* name, const weightd_memory& memory, uint32_t stage) {
  weightd_param param{};
  param.name = name;
  param.dtype = 1;
  param.num_dims = 1;
  param.shape[0] = 8;
  param.kind = stage == 0 ? 1 : 2;
  param.stage = stage;
  param.memory = memory;
  return param;
}

/// "weight" raw, "a" and "b" in stages 1 and 2 of the same memory.
struct StagedRig : EngineRig {
  StagedRig() {
    params[0] = Staged("weight", memory.Memory(8), 0);
    params[1] = Staged("a", memory.Memory(0), 1);
    params[2] = Staged("b", memory.Memory(0), 2);
  }
  void Convert(uint64_t counter, uint32_t stage) {
    v1::EngineEvent event;
    event.mutable_convert()->mutable_attempt()->set_epoch(1);
    event.mutable_convert()->mutable_attempt()->set_counter(counter);
    event.mutable_convert()->set_stage(stage);
    REQUIRE(daemon->engine.Send(event));
  }
  v1::EngineConverted AwaitConverted() {
    return Await([](const auto& r) { return r.has_converted(); }).converted();
  }
  /// An engine that was prepared for attempt 1 and is quiet.
  EnginePtr Quiet() {
    daemon->Start();
    EnginePtr engine = Open(false);
    REQUIRE(weightd_engine_register(engine.get(), params, 3) == nullptr);
    Prepare(1, 7);
    AwaitState(engine, [](const json& s) { return s["pending"] == "prepare"; });
    REQUIRE(weightd_engine_quiesced(engine.get(), nullptr) == nullptr);
    AwaitQuiesced();
    return engine;
  }
  weightd_param params[3];
};

std::string Overlap(const weightd_param (&params)[3]) {
  const Status status = ReadParams(params).status();
  INFO(Message(status));
  CHECK(FieldsOf(status).reason == reason::kOverlap);
  return FieldsOf(status).tensor;
}

}  // namespace

TEST_CASE("the caller converts every stage but the last before it is asked to commit") {
  StagedRig rig;
  const EnginePtr engine = rig.Quiet();
  const v1::ParamsPage page = [&] {
    size_t first = 0;
    std::swap(first, rig.from);
    const v1::ParamsPage found = rig.Await([](const auto& r) { return r.has_params(); }).params();
    std::swap(first, rig.from);
    return found;
  }();
  CHECK(page.params(0).stage() == 0);
  CHECK(page.params(2).stage() == 2);
  const ErrorPtr early(weightd_engine_converted(engine.get(), nullptr));
  CHECK(weightd_error_code(early.get()) == 9);

  rig.Convert(1, 1);
  json state = AwaitState(engine, [](const json& s) { return s["pending"] == "convert"; });
  CHECK(state["stage"] == 1);
  CHECK(state["dirty"] == true);
  CHECK(state["offered"] == 7);  // the attempt goes on
  REQUIRE(weightd_engine_converted(engine.get(), nullptr) == nullptr);
  const v1::EngineConverted converted = rig.AwaitConverted();
  CHECK(converted.stage() == 1);
  CHECK_FALSE(converted.has_error());
  state = TakeJson(weightd_engine_state(engine.get()));
  CHECK(state["stage"] == 0);
  CHECK(state["offered"] == 7);

  rig.Commit(1, 7);
  AwaitState(engine, [](const json& s) { return s["pending"] == "commit"; });
  REQUIRE(weightd_engine_committed(engine.get(), nullptr, nullptr) == nullptr);
  CHECK_FALSE(rig.AwaitCommitted().has_error());
  CHECK(TakeJson(weightd_engine_state(engine.get()))["version"] == 7);
}

TEST_CASE("a conversion that fails is told, and one of another attempt is refused") {
  StagedRig rig;
  const EnginePtr engine = rig.Quiet();
  rig.Convert(2, 1);
  CHECK(rig.AwaitConverted().error().reason() == "FENCED");
  rig.Convert(1, 1);
  AwaitState(engine, [](const json& s) { return s["pending"] == "convert"; });
  REQUIRE(weightd_engine_converted(engine.get(), "out of memory") == nullptr);
  const v1::EngineConverted answer = rig.AwaitConverted();
  CHECK(answer.error().message() == "out of memory");
  CHECK(answer.error().rank() == "engine e0 tp 1");
  CHECK(TakeJson(weightd_engine_state(engine.get()))["dirty"] == true);
}

TEST_CASE("an engine whose daemon is lost between two stages stays dirty") {
  StagedRig rig;
  const EnginePtr engine = rig.Quiet();
  rig.Convert(1, 1);
  AwaitState(engine, [](const json& s) { return s["pending"] == "convert"; });
  rig.daemon.reset();
  const json state = AwaitState(engine, [](const json& s) { return s["connected"] == false; });
  CHECK(state["pending"] == "");
  CHECK(state["dirty"] == true);
  CHECK(state["state"] == "POISONED");
}

TEST_CASE("an engine that answers by itself cannot have several stages") {
  StagedRig rig;
  rig.daemon->Start();
  const EnginePtr engine = rig.Open(true);
  const ErrorPtr error(weightd_engine_register(engine.get(), rig.params, 3));
  CHECK(Field(error, "reason") == "CONFIG");
  CHECK_THAT(Field(error, "remedy"), Catch::Contains("auto_quiesce"));
}

TEST_CASE("only stages that differ may share memory") {
  const SharedFloats memory(32);
  weightd_param params[3] = {Staged("weight", memory.Memory(8), 0),
                             Staged("a", memory.Memory(0), 1), Staged("b", memory.Memory(0), 2)};
  REQUIRE(ReadParams(params).ok());
  SECTION("two of one stage") {
    params[2].stage = 1;
    CHECK(Overlap(params) == "b");
  }
  SECTION("in place under a stage") {
    params[0].memory = memory.Memory(4);
    CHECK(Overlap(params) == "weight");
  }
  SECTION("in place around a stage") {
    params[0].memory = memory.Memory(0, {3});
    params[1].memory = params[2].memory = memory.Memory(9);
    CHECK(Overlap(params) == "a");
  }
  SECTION("in place before a stage that ends later") {
    params[1].memory = memory.Memory(0, {3});  // up to 22
    params[2].memory = memory.Memory(2);       // up to 10
    params[0].memory = memory.Memory(12);
    CHECK(Overlap(params) == "weight");
  }
  SECTION("a gap between stages") {
    params[2].stage = 3;
    CHECK(FieldsOf(ReadParams(params).status()).tensor == "b");
  }
}

namespace {

/// "weight" in place; "a" pulled in two parts of 5 and 3 rows, "b" after the second of them.
void PullIn(const SharedFloats& memory, weightd_param (&params)[3]) {
  params[0] = Staged("weight", memory.Memory(8), 0);
  params[1] = Staged("a", memory.Memory(0), 1);
  params[2] = Staged("b", memory.Memory(16), 2);
  for (weightd_param* param : {&params[1], &params[2]}) {
    param->kind = 1;
    param->pulled = 1;
  }
  params[1].stage_rows = 5;
}

}  // namespace

TEST_CASE("parts of a pulled parameter are bound one by one, in the same memory") {
  const SharedFloats memory(32);
  weightd_param params[3];
  PullIn(memory, params);
  const auto registration = ReadParams(params);
  REQUIRE(registration.ok());
  CHECK(registration->params[1].pulled);
  const std::vector<v1::BindMemory> pages = EngineBindings(*registration);
  REQUIRE(pages.size() == 1);
  const auto& bindings = pages[0].bindings();
  REQUIRE(bindings.size() == 4);
  for (int i = 0; i < 4; ++i) CHECK(bindings[i].index() == static_cast<uint32_t>(i));
  CHECK(bindings[1].extent(0) == 5);
  CHECK(bindings[2].extent(0) == 3);
  CHECK(bindings[1].offset_bytes() == bindings[2].offset_bytes());
  CHECK(bindings[3].extent(0) == 8);
}

TEST_CASE("memory of a part must hold a part, and be nobody else's in that stage") {
  const SharedFloats memory(21);
  weightd_param params[3];
  PullIn(memory, params);
  SECTION("a part at the end of its object") {
    params[1].memory = memory.Memory(16);
    params[2].memory = memory.Memory(0);
    CHECK(ReadParams(params).ok());
  }
  SECTION("no room for the whole of it") {
    params[1].stage_rows = 0;
    params[1].memory = memory.Memory(16);
    CHECK(FieldsOf(ReadParams(params).status()).reason == reason::kSharedMemory);
  }
  SECTION("shared in the stage of its second part") {
    params[2].memory = memory.Memory(2);
    CHECK(Overlap(params) == "b");
  }
}

TEST_CASE("an engine that answers by itself copies nothing") {
  StagedRig rig;
  rig.daemon->Start();
  const EnginePtr engine = rig.Open(true);
  rig.params[1].pulled = 1;
  const ErrorPtr error(weightd_engine_register(engine.get(), rig.params, 2));
  CHECK(Field(error, "reason") == "CONFIG");
  CHECK_THAT(Field(error, "remedy"), Catch::Contains("auto_quiesce"));
}

TEST_CASE("memory of a GPU needs a process that has loaded the driver") {
  void* address = nullptr;
  int value = 0;
  for (weightd_error* raw :
       {weightd_gpu_check(&value, 4), weightd_gpu_allocate(&value, 4, &address)}) {
    const ErrorPtr error(raw);
    CHECK(Field(error, "reason") == "DEVICE");
  }
  CHECK(address == nullptr);
  weightd_gpu_free(nullptr);
}

}  // namespace weightd::testing
