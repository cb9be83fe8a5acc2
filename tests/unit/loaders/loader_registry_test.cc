// The embedded rule files, directories of them, and the commands that need no daemon.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "client/ctl/pure/case_export.h"
#include "client/ctl/pure/layout_runs.h"
#include "client/ctl/pure/loader_commands.h"
#include "loaders/embedded_rules.h"

namespace weightd {
namespace {

namespace fs = std::filesystem;

constexpr char kOwnLlama[] =
    "architecture LlamaForCausalLM\nprofile vllm-0.32\na.#l.w -> & : rep\n";

// A directory that vanishes with the test.
class TempDir {
 public:
  TempDir() {
    std::string pattern = (fs::temp_directory_path() / "weightd-loaders-XXXXXX").string();
    REQUIRE(mkdtemp(pattern.data()) != nullptr);
    path_ = pattern;
  }
  ~TempDir() { fs::remove_all(path_); }
  std::string Write(const std::string& name, const std::string& text) const {
    const fs::path path = path_ / name;
    std::ofstream(path, std::ios::binary) << text;
    return path.string();
  }
  std::string path() const { return path_.string(); }

 private:
  fs::path path_;
};

TEST_CASE("every embedded file is sound and known by its file's name") {
  const auto registry = LoaderRegistry::Create("");
  INFO(registry.status().ToString());
  REQUIRE(registry.ok());
  CHECK((*registry)->loaders().size() == AllEmbeddedRules().size());
  size_t files = 0;
  for (const auto& entry : fs::directory_iterator(fs::path(WEIGHTD_SOURCE_DIR) / "loaders")) {
    if (entry.path().extension() != ".rules") continue;
    ++files;
    const std::string stem = entry.path().stem().string();
    CHECK(std::any_of((*registry)->loaders().begin(), (*registry)->loaders().end(),
                      [&stem](const auto& loader) { return loader->name() == stem; }));
  }
  CHECK(files == AllEmbeddedRules().size());
}

TEST_CASE("the Llama family goes by all of its names, and patch releases count as their release") {
  const auto registry = LoaderRegistry::Create("");
  REQUIRE(registry.ok());
  for (const char* architecture : {"LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM",
                                   "InternLMForCausalLM", "AquilaModel", "AquilaForCausalLM"}) {
    for (const char* profile : {"vllm-0.6.3", "vllm-0.32", "vllm-0.32.0"}) {
      const auto loader = (*registry)->Find(architecture, profile);
      REQUIRE(loader.ok());
      CHECK((*loader)->name() == "llama");
    }
  }
}

TEST_CASE("an unknown architecture is refused with the known ones and the nearest") {
  const auto registry = LoaderRegistry::Create("");
  REQUIRE(registry.ok());
  const Status status = (*registry)->Find("LamaForCausalLM", "vllm-0.32").status();
  CHECK(FieldsOf(status).reason == reason::kUnknownArchitecture);
  CHECK(Message(status).find("nearest: LlamaForCausalLM") != std::string::npos);
  CHECK(Message(status).find("Qwen2ForCausalLM") != std::string::npos);
}

TEST_CASE("an unknown profile is refused with the known ones") {
  const auto registry = LoaderRegistry::Create("");
  REQUIRE(registry.ok());
  for (const char* profile : {"sglang-0.4", "vllm-0.320", "vllm-0.3", ""}) {
    const Status status = (*registry)->Find("LlamaForCausalLM", profile).status();
    CHECK(FieldsOf(status).reason == reason::kUnknownProfile);
    CHECK(Message(status).find("vllm-0.6.3") != std::string::npos);
  }
}

TEST_CASE("a file of a directory wins over the embedded one, profile by profile") {
  const TempDir dir;
  const std::string path = dir.Write("own.rules", kOwnLlama);
  dir.Write("notes.txt", "not a rule file");
  const auto registry = LoaderRegistry::Create(dir.path());
  REQUIRE(registry.ok());
  CHECK((*(*registry)->Find("LlamaForCausalLM", "vllm-0.32"))->origin() == path);
  CHECK((*(*registry)->Find("LlamaForCausalLM", "vllm-0.6.3"))->origin() == "embedded:llama");
}

std::vector<ParamInfo> Named(std::initializer_list<const char*> names) {
  std::vector<ParamInfo> params;
  for (const char* name : names) params.push_back({.name = name, .shape = {1}});
  return params;
}

TEST_CASE("names of another profile are refused with the profile that they fit") {
  const auto registry = LoaderRegistry::Create("");
  REQUIRE(registry.ok());
  const auto old_names = Named({"model.layers.3.self_attn.q_a_proj.weight",
                                "model.layers.3.mlp.experts.w13_weight", "model.norm.weight"});
  const auto new_names = Named({"model.layers.3.self_attn.fused_qkv_a_proj.weight",
                                "model.layers.3.mlp.experts.routed_experts.w13_weight"});
  const auto check = [&registry](const char* architecture, const char* profile,
                                 const std::vector<ParamInfo>& params) {
    return (*registry)->CheckProfile(architecture, profile, params);
  };
  CHECK(check("DeepseekV2ForCausalLM", "vllm-0.6.3", old_names).ok());
  CHECK(check("DeepseekV2ForCausalLM", "vllm-0.32.0", new_names).ok());
  const Status fused = check("DeepseekV2ForCausalLM", "vllm-0.6.3", new_names);
  CHECK(FieldsOf(fused).reason == reason::kUnknownProfile);
  CHECK(FieldsOf(fused).tensor == "model.layers.3.self_attn.fused_qkv_a_proj.weight");
  CHECK(FieldsOf(fused).remedy == "report engine profile vllm-0.32 instead");
  const Status unfused = check("DeepseekV2ForCausalLM", "vllm-0.32", old_names);
  CHECK(FieldsOf(unfused).tensor == "model.layers.3.self_attn.q_a_proj.weight");
  CHECK(FieldsOf(unfused).remedy == "report engine profile vllm-0.6.3 instead");
  const Status backend =
      check("GPTBigCodeForCausalLM", "vllm-0.6.3", Named({"model.h.0.attn.c_attn.weight"}));
  CHECK(FieldsOf(backend).remedy == "report engine profile vllm-0.32 instead");
}

TEST_CASE("names that fit no profile, and parameters that weightd does not write, pass for now") {
  const auto registry = LoaderRegistry::Create("");
  REQUIRE(registry.ok());
  auto params = Named({"model.layers.0.mystery.weight"});
  CHECK((*registry)->CheckProfile("DeepseekV2ForCausalLM", "vllm-0.32", params).ok());
  params = Named({"model.layers.0.mlp.experts.w13_weight"});
  CHECK_FALSE((*registry)->CheckProfile("DeepseekV2ForCausalLM", "vllm-0.32", params).ok());
  params[0].kind = ParamKind::kOpaque;
  CHECK((*registry)->CheckProfile("DeepseekV2ForCausalLM", "vllm-0.32", params).ok());
  params[0].kind = ParamKind::kRaw;
  params[0].alias_of = "model.norm.weight";
  CHECK((*registry)->CheckProfile("DeepseekV2ForCausalLM", "vllm-0.32", params).ok());
  CHECK(FieldsOf((*registry)->CheckProfile("DeepseekV2ForCausalLM", "vllm-0.40", params)).reason ==
        reason::kUnknownProfile);
}

TEST_CASE("a directory with a malformed file, two files for one model, or none at all is refused") {
  const TempDir dir;
  CHECK(LoaderRegistry::Create(dir.path() + "/none").status().code() == StatusCode::kNotFound);
  dir.Write("a.rules", kOwnLlama);
  dir.Write("b.rules", kOwnLlama);
  CHECK(Message(LoaderRegistry::Create(dir.path()).status()).find("b.rules:1: another rule file") !=
        std::string::npos);
  dir.Write("b.rules", "architecture B\nprofile p\nx -> & : nonsense\n");
  const Status status = LoaderRegistry::Create(dir.path()).status();
  CHECK(Message(status).find("b.rules:3: unknown operation 'nonsense'") != std::string::npos);
}

TEST_CASE("loader list names every loader in text and JSON") {
  const auto registry = LoaderRegistry::Create("");
  REQUIRE(registry.ok());
  CHECK(ListLoaders(**registry, false).find("embedded:llama") != std::string::npos);
  const auto json = nlohmann::json::parse(ListLoaders(**registry, true));
  CHECK(json["loaders"].size() == AllEmbeddedRules().size());
  CHECK(json["loaders"][0]["origin"].get<std::string>().starts_with("embedded:"));
  CHECK(json["loaders"][0]["source"] == "embedded");
  const TempDir dir;
  const std::string path = dir.Write("own.rules", kOwnLlama);
  const auto both = LoaderRegistry::Create(dir.path());
  REQUIRE(both.ok());
  const auto own = nlohmann::json::parse(ListLoaders(**both, true))["loaders"][0];
  CHECK(own["source"] == "directory");
  CHECK(own["origin"] == path);
  CHECK(own["architectures"] == nlohmann::json{"LlamaForCausalLM"});
  CHECK(own["profiles"] == nlohmann::json{"vllm-0.32"});
}

TEST_CASE("loader check tells sound files from malformed ones") {
  const TempDir dir;
  const std::string good = dir.Write("good.rules", kOwnLlama);
  const auto one = CheckLoaders(good, false);
  REQUIRE(one.ok());
  CHECK(one->passed);
  CHECK(one->output.starts_with("ok     " + good));
  dir.Write("bad.rules", "architecture B\ncolour blue\n");
  const auto both = CheckLoaders(dir.path(), true);
  REQUIRE(both.ok());
  CHECK_FALSE(both->passed);
  const auto json = nlohmann::json::parse(both->output);
  REQUIRE(json["files"].size() == 2);
  CHECK(json["files"][0]["ok"] == false);
  CHECK(json["files"][0]["error"].get<std::string>().find("bad.rules:2: ") != std::string::npos);
  CHECK(json["files"][1]["ok"] == true);
  CHECK(CheckLoaders(dir.path() + "/none", false).status().code() == StatusCode::kNotFound);
}

TEST_CASE("runs merge as far as one stride reaches") {
  const TensorTable table{{"a", {2, 3}, DType::kFloat32}};
  RankLayout layout;
  layout.params.push_back({.name = "t", .shape = {3, 2}, .dtype = DType::kFloat32});
  Write write;
  write.source_dim = {1, 0};
  write.source = {{0, 0}, {2, 3}};
  write.target = {{0, 0}, {3, 2}};
  layout.writes.push_back(write);
  const auto transposed = RunsOf(layout, table);
  REQUIRE(transposed.ok());
  CHECK((*transposed)[0] == std::vector<Run>{{0, 2, 0, 0, 3}, {2, 2, 0, 1, 3}, {4, 2, 0, 2, 3}});
  layout.params[0].shape = {4, 2};
  CHECK(FieldsOf(RunsOf(layout, table).status()).reason == reason::kGap);
  layout.params[0].shape = {3, 2};
  layout.writes.push_back(write);
  CHECK(FieldsOf(RunsOf(layout, table).status()).reason == reason::kOverlap);
}

TEST_CASE("a file that is no case is refused with what is wrong") {
  const TempDir dir;
  const auto registry = LoaderRegistry::Create("");
  REQUIRE(registry.ok());
  const std::pair<const char*, const char*> cases[] = {
      {"[]", "not a JSON object"},
      {"{}", "'architecture' is missing"},
      {R"({"architecture": "Nope", "config": {}, "source": []})", "no loader describes"},
      {R"({"architecture": "LlamaForCausalLM"})", "'config' is missing"},
      {R"({"architecture": "LlamaForCausalLM", "config": {}})", "'source' is missing"},
      {R"({"architecture": "LlamaForCausalLM", "config": {}, "source": [["a", [-1]]]})",
       "no valid shape"},
      {R"({"architecture": "LlamaForCausalLM", "config": {}, "source": []})", "'ranks' is missing"},
      {R"({"architecture": "LlamaForCausalLM", "config": {}, "source": [],
           "ranks": [{"tp_size": -1}]})",
       "'tp_size' is not a small non-negative integer"},
  };
  for (const auto& [text, message] : cases) {
    CAPTURE(text);
    const std::string path = dir.Write("case.json", text);
    const auto result = ExportCase(path, **registry);
    REQUIRE_FALSE(result.ok());
    CHECK(Message(result.status()).find(message) != std::string::npos);
  }
  CHECK(ExportCase(dir.path() + "/none", **registry).status().code() == StatusCode::kNotFound);
  const std::string damaged = dir.Write("case.json.gz", "\x1f\x8b\x08\x00 truncated");
  CHECK_FALSE(ExportCase(damaged, **registry).ok());
}

}  // namespace
}  // namespace weightd
