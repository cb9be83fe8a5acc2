// Every golden-layout case, element by element: what engines' own loaders do to small models. Some
// lie in tests/data/layouts; two larger folders are looked for in $WEIGHTD_SHARED, by default
// ../shared beside the source tree, and left out, which is said, where they are not.
#include <zlib.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>

#include "client/ctl/pure/case_export.h"

namespace weightd {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

std::vector<fs::path> Folders() {
  const fs::path source = WEIGHTD_SOURCE_DIR;
  const char* set = std::getenv("WEIGHTD_SHARED");
  const fs::path shared = set != nullptr ? fs::path(set) : source / ".." / "shared";
  return {source / "tests" / "data" / "layouts", shared / "golden-layouts",
          shared / "golden-layouts-vllm032"};
}

std::vector<fs::path> CasesOf(const fs::path& folder) {
  std::vector<fs::path> paths;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    if (it->path().extension() == ".gz") paths.push_back(it->path());
  }
  std::sort(paths.begin(), paths.end());
  return paths;
}

Json ReadGolden(const fs::path& path) {
  std::string text;
  std::string chunk(1 << 20, '\0');
  const gzFile file = gzopen(path.c_str(), "rb");
  REQUIRE(file != nullptr);
  int count = 0;
  while ((count = gzread(file, chunk.data(), 1 << 20)) > 0) {
    text.append(chunk, 0, static_cast<size_t>(count));
  }
  gzclose_r(file);
  return Json::parse(text, nullptr, false);
}

std::shared_ptr<const LoaderRegistry> Registry() {
  const auto registry = LoaderRegistry::Create("");
  INFO(registry.status().ToString());
  REQUIRE(registry.ok());
  return *registry;
}

// The parameters of a rank as text, by name: engines list them in an order of their own.
std::map<std::string, std::string> ByName(const Json& params) {
  std::map<std::string, std::string> texts;
  for (const Json& param : params) texts[param[0].get<std::string>()] = param.dump();
  return texts;
}

// Empty, or the first difference between the golden case and what weightd makes of it.
std::string Difference(const Json& golden, const LoaderRegistry& registry) {
  Json question = golden;
  for (Json& rank : question["ranks"]) rank.erase("params");
  const auto text = ExportCaseText(question.dump(), "case", registry);
  if (!text.ok()) return Message(text.status());
  const Json answer = Json::parse(*text, nullptr, false);
  for (size_t r = 0; r < golden["ranks"].size(); ++r) {
    const Json& rank = golden["ranks"][r];
    const std::string where =
        fmt::format("tp {}/{}: ", rank["tp_rank"].get<int>(), rank["tp_size"].get<int>());
    const auto wanted = ByName(rank["params"]);
    const auto got = ByName(answer["ranks"][r]["params"]);
    for (const auto& [name, layout] : wanted) {
      if (!got.contains(name)) return where + "no parameter " + name;
      if (got.at(name) != layout) return where + name + " differs";
    }
    if (wanted.size() != got.size()) return where + "parameters that the engine does not have";
  }
  if (golden.contains("skipped_sources") &&
      golden["skipped_sources"] != answer["skipped_sources"]) {
    return "other sources are skipped";
  }
  return "";
}

// Sizes that the engine refuses for its own reasons must be refused here, too. Cases whose names
// the engine refuses were composed: weightd takes those names.
std::string AcceptedRefusal(const Json& golden, const LoaderRegistry& registry) {
  if (!golden.contains("refused") || golden.contains("composed")) return "";
  for (const Json& refused : golden["refused"]) {
    Json question = golden;
    Json rank = {{"tp_size", refused["tp_size"]}, {"tp_rank", refused["tp_rank"]}};
    if (golden.value("expert_parallel", false)) {
      rank["ep_size"] = refused["tp_size"];
      rank["ep_rank"] = refused["tp_rank"];
    }
    question["ranks"] = Json::array({rank});
    const auto text = ExportCaseText(question.dump(), "case", registry);
    if (text.ok()) return "accepts what the engine refuses: " + refused.dump();
    if (FieldsOf(text.status()).reason != reason::kDivisibility) return Message(text.status());
  }
  return "";
}

TEST_CASE("every golden case comes out element by element") {
  const auto registry = Registry();
  size_t cases = 0;
  size_t equal = 0;
  for (const fs::path& folder : Folders()) {
    size_t folder_cases = 0;
    size_t folder_equal = 0;
    for (const fs::path& path : CasesOf(folder)) {
      const Json golden = ReadGolden(path);
      REQUIRE(golden.is_object());
      std::string difference = Difference(golden, *registry);
      if (difference.empty()) difference = AcceptedRefusal(golden, *registry);
      ++folder_cases;
      folder_equal += difference.empty() ? 1 : 0;
      if (!difference.empty()) std::cout << path.filename().string() << ": " << difference << "\n";
    }
    std::cout << folder.filename().string() << ": " << folder_equal << " of " << folder_cases
              << (folder_cases == 0 ? " (left out: WEIGHTD_SHARED does not hold it)\n" : "\n");
    cases += folder_cases;
    equal += folder_equal;
  }
  CHECK(cases > 0);
  CHECK(equal == cases);
}

TEST_CASE("the comparison sees a moved element, a lost parameter and a lost skip") {
  const auto registry = Registry();
  Json golden = {{"architecture", "LlamaForCausalLM"},
                 {"config",
                  {{"hidden_size", 2},
                   {"num_attention_heads", 1},
                   {"intermediate_size", 2},
                   {"vocab_size", 3},
                   {"tie_word_embeddings", true}}},
                 {"source", Json::array({Json::array({"model.norm.weight", {2}}),
                                         Json::array({"lm_head.weight", {3, 2}})})},
                 {"ranks", Json::array({{{"tp_size", 1}, {"tp_rank", 0}}})},
                 {"skipped_sources", Json::array({"lm_head.weight"})}};
  golden["ranks"][0]["params"] = Json::array({Json::array(
      {"model.norm.weight", Json::array({2}), Json::array({Json::array({0, 2, 0, 0, 1})})})});
  CHECK(Difference(golden, *registry) == "");
  Json moved = golden;
  moved["ranks"][0]["params"][0][2][0][3] = 1;
  CHECK(Difference(moved, *registry) == "tp 0/1: model.norm.weight differs");
  Json lost = golden;
  lost["ranks"][0]["params"][0][0] = "model.other.weight";
  CHECK(Difference(lost, *registry) == "tp 0/1: no parameter model.other.weight");
  Json skipped = golden;
  skipped["skipped_sources"] = Json::array();
  CHECK(Difference(skipped, *registry) == "other sources are skipped");
}

}  // namespace
}  // namespace weightd
