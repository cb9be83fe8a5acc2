// `weightctl loader check --trace`: what a rule file says against what tracing found.
#include "client/ctl/pure/trace_check.h"

#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

namespace weightd {
namespace {

using nlohmann::json;

constexpr char kRules[] = R"(architecture A
profile vllm-0.32
w -> & : col
q -> pair : merge(4,4).0
k -> pair : merge(4,4).1
mask : skip
)";

/// A folder with the rule file "a.rules" and the trace "t.json".
struct Rig {
  std::filesystem::path folder =
      std::filesystem::temp_directory_path() / ("weightd-trace-" + std::to_string(::getpid()));
  std::string rules = (folder / "a.rules").string();
  json trace = json::parse(R"({
    "weightd_trace": 1, "architecture": "A", "engine_profile": "vllm-0.32", "config": {},
    "source": [["w", [4, 3]], ["q", [4, 2]], ["k", [4, 2]], ["mask", [9]]],
    "ranks": [{"tp_size": 2, "tp_rank": 1,
               "params": [["w", [2, 3]], ["pair", [4, 2]]],
               "writes": [[0, 0, [0, 0], [2, 3], [2, 0], [0, 1]],
                          [1, 1, [0, 0], [2, 2], [2, 0], [0, 1]],
                          [1, 2, [2, 0], [2, 2], [2, 0], [0, 1]]],
               "skipped_sources": ["mask"]}]})");

  Rig() {
    std::filesystem::create_directory(folder);
    std::ofstream(rules) << kRules;
  }
  ~Rig() { std::filesystem::remove_all(folder); }

  StatusOr<LoaderCheck> Check(bool as_json = false) const {
    const std::string path = (folder / "t.json").string();
    std::ofstream(path) << trace.dump();
    return CheckTrace(rules, path, as_json);
  }
  json& writes() { return trace["ranks"][0]["writes"]; }
};

bool Has(const std::string& text, const std::string& part) {
  INFO(text);
  CHECK(text.find(part) != std::string::npos);
  return true;
}

TEST_CASE("a rule file that says what tracing found passes") {
  Rig rig;
  const auto check = rig.Check();
  REQUIRE(check.ok());
  CHECK(check->passed);
  Has(check->output, "tracing found the same: A vllm-0.32, 1 ranks, 2 parameters, 14 elements");
  rig.rules = rig.folder.string();
  CHECK(rig.Check()->passed);
}

TEST_CASE("the first differing element of a parameter is named with both origins") {
  Rig rig;
  // The halves of `pair` are exchanged.
  std::swap(rig.writes()[1][2], rig.writes()[2][2]);
  const auto check = rig.Check();
  REQUIRE(check.ok());
  CHECK_FALSE(check->passed);
  Has(check->output, "other elements in 1 of 2 parameters");
  Has(check->output, "tp 1/2: pair[0, 0]: rules=q[2, 0] traced=k[2, 0] (8 elements of it differ)");
}

TEST_CASE("a single element that differs is found") {
  Rig rig;
  rig.writes()[0] = json::parse("[0, 0, [0, 0], [1, 3], [2, 0], [-1, 1]]");
  rig.writes().push_back(json::parse("[0, 0, [1, 0], [1, 2], [3, 0], [-1, 1]]"));
  rig.writes().push_back(json::parse("[0, -1, [1, 2], [1, 1], [], []]"));
  const auto check = rig.Check(true);
  REQUIRE(check.ok());
  CHECK_FALSE(check->passed);
  const json file = json::parse(check->output)["files"][0];
  CHECK(file["differing_parameters"] == 1);
  CHECK(file["differences"][0] == json::parse(R"({"rank": "tp 1/2", "parameter": "w",
    "element": "[1, 2]", "rules": "w[3, 2]", "traced": "zero", "count": 1})"));
}

TEST_CASE("a transposition is seen, and where it agrees by chance is not counted") {
  Rig rig;
  rig.trace["source"][0][1] = {3, 3};
  rig.trace["ranks"][0] = json::parse(R"({"params": [["w", [3, 3]], ["pair", [8, 2]]],
    "writes": [[0, 0, [0, 0], [3, 3], [0, 0], [1, 0]], [1, 1, [0, 0], [4, 2], [0, 0], [0, 1]],
               [1, 2, [4, 0], [4, 2], [0, 0], [0, 1]]]})");
  const auto check = rig.Check();
  REQUIRE(check.ok());
  Has(check->output, "w[0, 1]: rules=w[0, 1] traced=w[1, 0] (6 elements of it differ)");
}

TEST_CASE("what the rules refuse is the result, with the rank") {
  Rig rig;
  rig.trace["ranks"][0]["params"][0] = {"other", {2, 3}};
  const auto check = rig.Check();
  REQUIRE(check.ok());
  CHECK_FALSE(check->passed);
  Has(check->output, "tp 1/2");
  Has(check->output, "other");
}

TEST_CASE("files that cannot be compared are refused") {
  Rig rig;
  const auto reason_of = [&rig] { return FieldsOf(rig.Check().status()).reason; };
  SECTION("another model") {
    rig.trace["architecture"] = "B";
    CHECK(reason_of() == reason::kUnknownArchitecture);
  }
  SECTION("no trace") {
    rig.trace.erase("weightd_trace");
    CHECK(reason_of() == reason::kConfig);
  }
  SECTION("a later format") {
    rig.trace["weightd_trace"] = 2;
    CHECK(reason_of() == reason::kConfig);
  }
  SECTION("a write of a tensor that is not there") {
    rig.writes()[0][1] = 4;
    CHECK(reason_of() == reason::kConfig);
  }
  SECTION("a dimension that is not there") {
    rig.writes()[0][5] = {0, 2};
    CHECK(reason_of() == reason::kConfig);
  }
  SECTION("an element written twice") {
    rig.writes().push_back(rig.writes()[0]);
    CHECK(reason_of() == reason::kOverlap);
  }
  SECTION("an element not written") {
    rig.writes().erase(0);
    CHECK(reason_of() == reason::kUncoveredParameter);
  }
  SECTION("a block outside its source") {
    rig.writes()[0][4] = {3, 0};
    CHECK(reason_of() == reason::kShape);
  }
}

}  // namespace
}  // namespace weightd
