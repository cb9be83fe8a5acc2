// Bad models and bad rule files, through the embedded loaders: each an error that names the tensor,
// the numbers and the remedy.
#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include "client/ctl/pure/case_export.h"
#include "loaders/embedded_rules.h"

namespace weightd {
namespace {

using Json = nlohmann::ordered_json;

constexpr char kGpt2Config[] = R"({"n_embd": 4, "n_head": 2, "vocab_size": 64})";

void CheckRefused(const Status& status, std::string_view reason, std::string_view tensor,
                  std::string_view text) {
  INFO(Message(status));
  REQUIRE_FALSE(status.ok());
  CHECK(FieldsOf(status).reason == reason);
  CHECK(FieldsOf(status).tensor == tensor);
  CHECK_FALSE(FieldsOf(status).remedy.empty());
  CHECK(Message(status).find(text) != std::string::npos);
}

std::shared_ptr<const LoaderRegistry> Registry() {
  const auto registry = LoaderRegistry::Create("");
  REQUIRE(registry.ok());
  return *registry;
}

Status Export(const std::string& architecture, const Json& config, const Json& source, int tp,
              const Json& rank = Json::object()) {
  Json at = {{"tp_size", tp}, {"tp_rank", 0}};
  at.update(rank);
  const Json question = {{"architecture", architecture},
                         {"config", config},
                         {"source", source},
                         {"ranks", Json::array({at})}};
  return ExportCaseText(question.dump(), "case", *Registry()).status();
}

// The text of an embedded file with one thing changed.
std::shared_ptr<const Loader> Changed(std::string_view name, const std::string& from,
                                      const std::string& to) {
  for (const EmbeddedRules& rules : AllEmbeddedRules()) {
    if (rules.name != name) continue;
    std::string text(rules.text);
    const size_t at = text.find(from);
    REQUIRE(at != std::string::npos);
    const auto loader = Loader::Parse(text.replace(at, from.size(), to), "changed.rules");
    INFO(loader.status().ToString());
    REQUIRE(loader.ok());
    return *loader;
  }
  FAIL("no such file: " << name);
  return nullptr;
}

// Binds and lowers for an engine that reports the parameters which the unchanged file derives.
Status LowerChanged(const Loader& changed, std::string_view name, const TensorTable& table,
                    const char* config) {
  const auto right = Registry()->Find(changed.architectures()[0], "vllm-0.32");
  REQUIRE(right.ok());
  REQUIRE((*right)->name() == name);
  const auto bind = [&](const Loader& loader) {
    return loader.Bind(table, config, changed.architectures()[0], "vllm-0.32", {});
  };
  const auto bound = bind(**right);
  INFO(bound.status().ToString());
  REQUIRE(bound.ok());
  const auto reported = (*bound)->Lower({}, {});
  REQUIRE(reported.ok());
  const auto wrong = bind(changed);
  if (!wrong.ok()) return wrong.status();
  return (*wrong)->Lower({}, reported->params).status();
}

TEST_CASE("head counts and widths that tp does not divide are named with both numbers") {
  const Json config = {{"hidden_size", 12},
                       {"num_attention_heads", 6},
                       {"num_key_value_heads", 3},
                       {"intermediate_size", 10},
                       {"vocab_size", 64}};
  const std::string layer = "model.layers.0.";
  const Json key = Json::array({Json::array({layer + "self_attn.k_proj.weight", {6, 12}})});
  CheckRefused(Export("LlamaForCausalLM", config, key, 2), reason::kDivisibility,
               layer + "self_attn.k_proj.weight", "nkv=3, tp=2");
  const Json query = Json::array({Json::array({layer + "self_attn.q_proj.weight", {12, 12}})});
  CheckRefused(Export("LlamaForCausalLM", config, query, 4), reason::kDivisibility,
               layer + "self_attn.q_proj.weight", "nq=6, tp=4");
  const Json gate = Json::array({Json::array({layer + "mlp.gate_proj.weight", {10, 12}})});
  CheckRefused(Export("LlamaForCausalLM", config, gate, 3), reason::kDivisibility,
               layer + "mlp.gate_proj.weight", "I=10, tp=3");
  const Json head = Json::array({Json::array({"lm_head.weight", {64, 12}})});
  CheckRefused(Export("LlamaForCausalLM", config, head, 3), reason::kDivisibility, "lm_head.weight",
               "V=64, padded=64, tp=3");
}

TEST_CASE("experts that expert parallelism cannot hold are refused") {
  const Json config = {{"hidden_size", 4},        {"num_attention_heads", 4},
                       {"intermediate_size", 4},  {"vocab_size", 64},
                       {"num_local_experts", 5},  {"head_dim", 4},
                       {"num_key_value_heads", 4}};
  const std::string name = "model.layers.0.mlp.experts.gate_up_proj";
  const Json source = Json::array({Json::array({name, {5, 4, 8}})});
  CheckRefused(Export("GptOssForCausalLM", config, source, 2, {{"ep_size", 2}, {"ep_rank", 0}}),
               reason::kDivisibility, "", "E=5, ep=2");
  const Json stack = Json::array({Json::array({name, {5, 8, 4}})});
  CheckRefused(Export("MixtralForCausalLM", config, stack, 8, {{"ep_size", 8}, {"ep_rank", 0}}),
               reason::kDivisibility, name, "E=5, ep=8");
}

TEST_CASE("a config without head_dim, with null, or with another one decides the width of a head") {
  const std::string name = "model.layers.0.self_attn.q_proj.weight";
  Json config = {{"hidden_size", 12},
                 {"num_attention_heads", 3},
                 {"intermediate_size", 4},
                 {"vocab_size", 64}};
  const Json source = Json::array({Json::array({name, {12, 12}})});
  CHECK(Export("LlamaForCausalLM", config, source, 1).code() != StatusCode::kInternal);
  for (const Json& width : {Json(nullptr), Json(4)}) {
    config["head_dim"] = width;
    CHECK_FALSE(FieldsOf(Export("LlamaForCausalLM", config, source, 1)).reason == reason::kShape);
  }
  config["head_dim"] = 5;
  CheckRefused(Export("LlamaForCausalLM", config, source, 1), reason::kShape, name, "= 15");
}

TEST_CASE("a rule whose pattern matches nothing leaves its tensor unknown, with the near name") {
  const auto changed = Changed("gpt2", "attn.c_attn.weight -> ", "attn.c_atn.weight -> ");
  const TensorTable table{{"transformer.h.0.attn.c_attn.weight", {4, 12}, DType::kFloat32}};
  CheckRefused(LowerChanged(*changed, "gpt2", table, kGpt2Config), reason::kUnknownTensor,
               "transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_atn.weight");
}

TEST_CASE("a transposition that is forgotten shows in the shape") {
  const auto changed = Changed("gpt2", "T col", "col");
  const TensorTable table{{"transformer.h.0.mlp.c_fc.weight", {4, 16}, DType::kFloat32}};
  CheckRefused(LowerChanged(*changed, "gpt2", table, kGpt2Config), reason::kShape,
               "transformer.h.0.mlp.c_fc.weight", "reported=[16, 4], implied=[4, 16]");
}

TEST_CASE("a transposition too many shows in the shape, also of stacked experts") {
  const auto changed = Changed("mixtral", ": moe3.down", ": T moe3.down");
  const TensorTable table{{"model.layers.0.mlp.experts.down_proj", {2, 4, 8}, DType::kFloat32}};
  const char* config = R"({"hidden_size": 4, "num_attention_heads": 2, "vocab_size": 64,
                           "num_local_experts": 2, "intermediate_size": 8})";
  CheckRefused(LowerChanged(*changed, "mixtral", table, config), reason::kShape,
               "model.layers.0.mlp.experts.down_proj", "[2, 4, 8]");
}

TEST_CASE("two rules for one tensor are refused with both lines") {
  const auto changed = Changed("gpt2", "(transformer.|)wpe.weight -> transformer.wpe.weight : rep",
                               "(transformer.|)w(p|t)e.weight -> transformer.w$2e.weight : rep");
  const TensorTable table{{"transformer.wte.weight", {64, 4}, DType::kFloat32}};
  CheckRefused(LowerChanged(*changed, "gpt2", table, kGpt2Config), reason::kAmbiguousRule,
               "transformer.wte.weight", "two rules place the same tensor");
}

TEST_CASE("two tensors that write one element of a parameter are refused") {
  const auto changed = Changed("gpt2", "(attn|mlp).c_proj.bias -> transformer.h.#l.$2.c_proj.bias",
                               "(attn|mlp).c_proj.bias -> transformer.h.#l.mlp.c_proj.bias");
  const TensorTable table{{"transformer.h.0.attn.c_proj.bias", {4}, DType::kFloat32},
                          {"transformer.h.0.mlp.c_proj.bias", {4}, DType::kFloat32}};
  CheckRefused(LowerChanged(*changed, "gpt2", table, kGpt2Config), reason::kDuplicateTensor,
               "transformer.h.0.mlp.c_proj.bias", "the other is transformer.h.0.attn.c_proj.bias");
}

}  // namespace
}  // namespace weightd
