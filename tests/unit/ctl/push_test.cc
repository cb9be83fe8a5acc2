// What `weightctl push` decides before it touches anything, and how it shows progress.
#include <catch2/catch.hpp>

#include "client/ctl/push_progress.h"
#include "client/ctl/push_target.h"

namespace weightd::ctl {
namespace {

v1::ModelStatus* AddModel(v1::GetStatusResponse* status, const std::string& name) {
  v1::ModelStatus* model = status->add_models();
  model->set_model(name);
  return model;
}

v1::EngineStatus* AddEngine(v1::ModelStatus* model, const std::string& architecture) {
  v1::EngineStatus* engine = model->add_engines();
  engine->set_engine("e0");
  engine->set_architecture(architecture);
  engine->set_state(v1::ENGINE_STATE_REGISTERED);
  return engine;
}

StatusOr<PushTarget> Choose(const v1::GetStatusResponse& status, PushOptions options = {}) {
  options.directory = "dir";
  return ChooseTarget(status, {"LlamaForCausalLM"}, options);
}

TEST_CASE("the version is one above everything that weightd has seen, unless it is given") {
  v1::GetStatusResponse status;
  v1::ModelStatus* model = AddModel(&status, "m");
  v1::EngineStatus* engine = AddEngine(model, "LlamaForCausalLM");
  CHECK(Choose(status)->version == 1);
  model->set_highest_version(4);
  CHECK(Choose(status)->version == 5);
  engine->set_version(9);
  CHECK(Choose(status)->version == 10);
  CHECK(Choose(status, {.version = 3})->version == 3);
  CHECK(Choose(status)->model == "m");
}

TEST_CASE("several models want a choice, unknown ones and lost engines are refused") {
  v1::GetStatusResponse status;
  CHECK(Choose(status).status().code() == StatusCode::kNotFound);
  AddEngine(AddModel(&status, "a"), "LlamaForCausalLM");
  v1::EngineStatus* lost = AddEngine(AddModel(&status, "b"), "LlamaForCausalLM");
  const Status several = Choose(status).status();
  CHECK(several.code() == StatusCode::kInvalidArgument);
  CHECK(Message(several).find("a, b") != std::string::npos);
  CHECK(Choose(status, {.model = "b"})->model == "b");
  CHECK(Message(Choose(status, {.model = "c"}).status()).find("known: a, b") != std::string::npos);
  lost->set_state(v1::ENGINE_STATE_GONE);
  CHECK(FieldsOf(Choose(status, {.model = "b"}).status()).reason == reason::kNoEngine);
}

TEST_CASE("an engine of another architecture is named with both architectures") {
  v1::GetStatusResponse status;
  v1::ModelStatus* model = AddModel(&status, "m");
  AddEngine(model, "LlamaForCausalLM");
  v1::EngineStatus* other = AddEngine(model, "Qwen2ForCausalLM");
  const Status refused = Choose(status).status();
  CHECK(FieldsOf(refused).reason == reason::kConfig);
  CHECK(FieldsOf(refused).peer == "engine e0 dp 0");
  CHECK(Message(refused).find("dir/config.json names LlamaForCausalLM, engine e0 runs "
                              "Qwen2ForCausalLM") != std::string::npos);
  other->set_state(v1::ENGINE_STATE_GONE);
  CHECK(Choose(status).ok());
}

TEST_CASE("a trainer that is registered is fenced only when told") {
  v1::GetStatusResponse status;
  v1::ModelStatus* model = AddModel(&status, "m");
  AddEngine(model, "LlamaForCausalLM");
  model->mutable_actors()->set_group("g");
  CHECK(FieldsOf(Choose(status).status()).reason == reason::kFenced);
  CHECK(Choose(status, {.take_over = true}).ok());
}

TEST_CASE("progress is the phase, with a bar where bytes move") {
  CHECK(ProgressBar({.phase = "prepare"}) == "prepare");
  CHECK(ProgressBar({"transfer", 0, 2048, 0}) ==
        "transfer [....................]   0 %  0 B of 2.00 KiB  -");
  CHECK(ProgressBar({"transfer", 1024, 2048, 0.5}) ==
        "transfer [##########..........]  50 %  1.00 KiB of 2.00 KiB  2.00 KiB/s");
  CHECK(ProgressBar({"transfer", 2048, 2048, 1}) ==
        "transfer [####################] 100 %  2.00 KiB of 2.00 KiB  2.00 KiB/s");
  CHECK(ProgressBar({"transfer", 4096, 2048, 1}).find("100 %") != std::string::npos);
}

}  // namespace
}  // namespace weightd::ctl
