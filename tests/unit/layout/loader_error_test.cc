// What models and engines that do not fit get: a reason, the tensor, the numbers, the remedy.
#include <algorithm>
#include <catch2/catch.hpp>

#include "daemon/layout/loader.h"
#include "tests/unit/layout/rank_image.h"

namespace weightd {
namespace {

constexpr char kRules[] = R"(
architecture A
profile vllm-0.32
symbol nq = config.heads
symbol nkv = config.kv
symbol d = config.d
symbol I = config.inner
symbol V = config.vocab
symbol L = config.layers
symbol tie = config.tie else 0
head head.weight
*.inv_freq : skip
mtp.* : skip
emb.weight -> & : vocab
l.#l.* : skip if=#l >= L
l.#l.(q|k|v).(weight|bias) -> l.#l.qkv.$2 : gqa.$1
l.#l.(gate|up) -> l.#l.mlp : merge(I,I).$1
l.#l.norm.bias -> & : rep optional
head.weight : skip if=tie
head.weight -> & : vocab if=not(tie)
)";

constexpr char kConfig[] =
    R"({"heads": 8, "kv": 4, "d": 2, "inner": 12, "vocab": 70, "layers": 2, "tie": false})";

TensorTable Model() {
  TensorTable table{{"emb.weight", {70, 4}, DType::kFloat32}};
  for (const std::string layer : {"l.0.", "l.1."}) {
    table.push_back({layer + "q.weight", {16, 4}, DType::kFloat32});
    table.push_back({layer + "k.weight", {8, 4}, DType::kFloat32});
    table.push_back({layer + "v.weight", {8, 4}, DType::kFloat32});
    table.push_back({layer + "gate", {12, 4}, DType::kFloat32});
    table.push_back({layer + "up", {12, 4}, DType::kFloat32});
  }
  table.push_back({"head.weight", {70, 4}, DType::kFloat32});
  return table;
}

StatusOr<std::shared_ptr<const BoundLoader>> Bind(const TensorTable& table,
                                                  std::span<const ParamInfo> reported = {},
                                                  const std::string& config = kConfig) {
  const auto loader = Loader::Parse(kRules, "a.rules");
  INFO(loader.status().ToString());
  REQUIRE(loader.ok());
  return (*loader)->Bind(table, config, "A", "vllm-0.32.1", reported);
}

// The error of binding `table`, or of lowering it for a rank.
Status Refusal(const TensorTable& table, const EngineCoordinates& at = {},
               std::span<const ParamInfo> reported = {}, const std::string& config = kConfig) {
  const auto bound = Bind(table, reported, config);
  if (!bound.ok()) return bound.status();
  return (*bound)->Lower(at, reported).status();
}

std::vector<ParamInfo> Reported(const EngineCoordinates& at = {}) {
  const auto bound = Bind(Model());
  REQUIRE(bound.ok());
  const auto layout = (*bound)->Lower(at, {});
  REQUIRE(layout.ok());
  return layout->params;
}

void CheckRefusal(const Status& status, const char* reason, const std::string& tensor,
                  const std::string& text) {
  INFO(status.ToString());
  CHECK_FALSE(status.ok());
  CHECK(FieldsOf(status).reason == reason);
  CHECK(FieldsOf(status).tensor == tensor);
  CHECK_FALSE(FieldsOf(status).remedy.empty());
  CHECK(Message(status).find(text) != std::string::npos);
  if (!tensor.empty()) CHECK(Message(status).find(tensor) != std::string::npos);
}

TEST_CASE("parameters come in layer order, whatever the order of the tensors") {
  TensorTable table = Model();
  std::reverse(table.begin(), table.end());
  const auto bound = Bind(table);
  REQUIRE(bound.ok());
  const auto layout = (*bound)->Lower({}, {});
  REQUIRE(layout.ok());
  std::vector<std::string> names;
  for (const ParamInfo& param : layout->params) names.push_back(param.name);
  CHECK(names == std::vector<std::string>{"emb.weight", "l.0.qkv.weight", "l.0.mlp",
                                          "l.1.qkv.weight", "l.1.mlp", "head.weight"});
}

TEST_CASE("an unknown tensor is refused with the nearest known names") {
  TensorTable table = Model();
  table[6].name = "l.1.query.weight";
  CheckRefusal(Refusal(table), reason::kUnknownTensor, "l.1.query.weight", "l.1.q.weight");
}

TEST_CASE("a tensor that is registered twice is refused") {
  TensorTable table = Model();
  table.push_back(table[2]);
  CheckRefusal(Refusal(table), reason::kDuplicateTensor, "l.0.k.weight", "twice");
}

TEST_CASE("a missing tensor is refused by the name that its parameter needs") {
  TensorTable table = Model();
  table.erase(table.begin() + 3);
  CheckRefusal(Refusal(table), reason::kMissingTensor, "l.0.v.weight", "l.0.qkv.weight");
  CheckRefusal(Refusal(table, {}, Reported()), reason::kMissingTensor, "l.0.v.weight",
               "l.0.qkv.weight");
}

TEST_CASE("a parameter all of whose tensors are missing is refused") {
  TensorTable table = Model();
  table.erase(table.begin() + 9, table.begin() + 11);
  CheckRefusal(Refusal(table, {}, Reported()), reason::kMissingTensor, "l.1.gate",
               "l.1.gate, l.1.up");
}

TEST_CASE("a parameter that no rule writes is refused, unless it is opaque or an alias") {
  std::vector<ParamInfo> reported = Reported();
  reported.push_back({.name = "l.0.scale", .shape = {1}, .dtype = DType::kFloat32});
  CheckRefusal(Refusal(Model(), {}, reported), reason::kUncoveredParameter, "l.0.scale", "a.rules");
  reported.back().kind = ParamKind::kOpaque;
  CHECK(Refusal(Model(), {}, reported).ok());
  reported.back().kind = ParamKind::kRaw;
  reported.back().alias_of = "emb.weight";
  CHECK(Refusal(Model(), {}, reported).ok());
}

TEST_CASE("a parameter whose tensors are all skipped is refused with what to do") {
  const auto loader = Loader::Parse(
      "architecture A\nprofile p\nsymbol bias = config.bias else 0\n"
      "a.bias : skip if=not(bias)\na.(weight|bias) -> & : rep\n",
      "t");
  REQUIRE(loader.ok());
  const TensorTable table{{"a.weight", {2}, DType::kFloat32}, {"a.bias", {2}, DType::kFloat32}};
  std::vector<ParamInfo> reported = {{.name = "a.weight", .shape = {2}},
                                     {.name = "a.bias", .shape = {2}}};
  const auto without = (*loader)->Bind(table, "{}", "A", "p", reported);
  REQUIRE(without.ok());
  CHECK((*without)->skipped() == std::vector<uint32_t>{1});
  CheckRefusal((*without)->Lower({}, reported).status(), reason::kUncoveredParameter, "a.bias",
               "rules of loader t (t) skip every tensor");
  const auto with = (*loader)->Bind(table, R"({"bias": true})", "A", "p", reported);
  REQUIRE(with.ok());
  CHECK((*with)->Lower({}, reported).ok());
  reported.pop_back();
  CHECK((*without)->Lower({}, reported).ok());
}

TEST_CASE(
    "a tensor for which the engine has no parameter is refused, but not by a pipeline stage") {
  std::vector<ParamInfo> reported = Reported();
  reported.erase(reported.begin() + 2);
  CheckRefusal(Refusal(Model(), {}, reported), reason::kUnknownTensor, "l.0.gate", "l.0.mlp");
  CHECK(Refusal(Model(), {.pp_size = 2}, reported).ok());
}

TEST_CASE("an optional parameter may be lacking on either side") {
  TensorTable table = Model();
  table.push_back({"l.1.norm.bias", {4}, DType::kFloat32});
  CHECK(Refusal(table, {}, Reported()).ok());
  CHECK(Refusal(Model(), {}, Reported()).ok());
}

TEST_CASE("a shape that the config contradicts is refused with both numbers") {
  TensorTable table = Model();
  table[0].shape = {72, 4};
  CheckRefusal(Refusal(table), reason::kShape, "emb.weight", "V = 70");
  table = Model();
  table[2].shape = {16, 4};
  CheckRefusal(Refusal(table), reason::kShape, "l.0.k.weight", "(nkv)*(d) = 8");
}

TEST_CASE("a shape that the engine contradicts is refused with both shapes") {
  std::vector<ParamInfo> reported = Reported();
  reported[1].shape = {16, 4};
  CheckRefusal(Refusal(Model(), {}, reported), reason::kShape, "l.0.qkv.weight",
               "reported=[16, 4], implied=[32, 4]");
}

TEST_CASE("sources of different widths for one parameter are refused") {
  TensorTable table = Model();
  table[2].shape = {8, 5};
  CheckRefusal(Refusal(table), reason::kShape, "l.0.k.weight", "different shapes");
}

TEST_CASE("parallel sizes that do not divide are refused with the sizes' names") {
  CheckRefusal(Refusal(Model(), {.tp_size = 3}), reason::kDivisibility, "emb.weight", "tp=3");
  TensorTable table = Model();
  table.erase(table.begin());
  table.pop_back();
  CheckRefusal(Refusal(table, {.tp_size = 3}), reason::kDivisibility, "l.0.q.weight", "nq=8, tp=3");
  const std::string config =
      R"({"heads": 12, "kv": 4, "d": 2, "inner": 12, "vocab": 70, "layers": 2})";
  for (TensorInfo& tensor : table) {
    if (tensor.name.find("q.") != std::string::npos) tensor.shape[0] = 24;
  }
  CheckRefusal(Refusal(table, {.tp_size = 6}, {}, config), reason::kDivisibility, "l.0.q.weight",
               "nkv=4, tp=6");
}

TEST_CASE("coordinates outside their sizes are refused") {
  CHECK(FieldsOf(Refusal(Model(), {.tp_rank = 2, .tp_size = 2})).reason == reason::kWorldSize);
  CHECK(FieldsOf(Refusal(Model(), {.tp_size = 0})).reason == reason::kWorldSize);
}

TEST_CASE("a config field that the rules need is asked for by name") {
  const std::string config = R"({"heads": 8, "d": 2, "inner": 12, "vocab": 70, "layers": 2})";
  CheckRefusal(Refusal(Model(), {}, {}, config), reason::kConfig, "l.0.q.weight", "config.kv");
  CHECK(FieldsOf(Refusal(Model(), {}, {}, "[1]")).reason == reason::kConfig);
}

TEST_CASE("whether the head is tied follows the engine, then the config") {
  const std::string tied =
      R"({"heads": 8, "kv": 4, "d": 2, "inner": 12, "vocab": 70, "layers": 2, "tie": true})";
  const auto by_config = Bind(Model(), {}, tied);
  REQUIRE(by_config.ok());
  CHECK((*by_config)->skipped() == std::vector<uint32_t>{11});
  std::vector<ParamInfo> reported = Reported();
  const auto untied = Bind(Model(), reported, tied);
  REQUIRE(untied.ok());
  CHECK((*untied)->skipped().empty());
  CHECK((*untied)->Lower({}, reported).ok());
  reported.back().alias_of = "emb.weight";
  const auto alias = Bind(Model(), reported);
  REQUIRE(alias.ok());
  CHECK((*alias)->skipped() == std::vector<uint32_t>{11});
}

TEST_CASE("layers beyond the model's and rotary tables are skipped") {
  TensorTable table = Model();
  table.push_back({"l.2.q.weight", {1}, DType::kFloat32});
  table.push_back({"l.0.rotary.inv_freq", {1}, DType::kFloat32});
  const auto bound = Bind(table);
  REQUIRE(bound.ok());
  CHECK((*bound)->skipped() == std::vector<uint32_t>{12, 13});
}

TEST_CASE("two rules for one tensor and two tensors for one place are refused") {
  const auto loader =
      Loader::Parse("architecture A\nprofile p\na.#l -> & : rep\n(a|b).#l -> c.#l : rep\n", "t");
  REQUIRE(loader.ok());
  const TensorTable one{{"a.0", {1}, DType::kFloat32}};
  CheckRefusal((*loader)->Bind(one, "{}", "A", "p", {}).status(), reason::kAmbiguousRule, "a.0",
               "t:3 and line 4");
  const auto spelled = Loader::Parse("architecture A\nprofile p\n(x.|)a -> a : rep\n", "t");
  REQUIRE(spelled.ok());
  const TensorTable both{{"a", {1}, DType::kFloat32}, {"x.a", {1}, DType::kFloat32}};
  CheckRefusal((*spelled)->Bind(both, "{}", "A", "p", {}).status(), reason::kDuplicateTensor, "x.a",
               "the other is a");
}

TEST_CASE("reported parameters keep their order and are found in any") {
  std::vector<ParamInfo> reported = Reported();
  const auto bound = Bind(Model(), reported);
  REQUIRE(bound.ok());
  std::reverse(reported.begin(), reported.end());
  const auto layout = (*bound)->Lower({}, reported);
  REQUIRE(layout.ok());
  CHECK(layout->params == reported);
  const TensorTable table = Model();
  for (const auto& image : test::ImageOf(*layout, table)) {
    CHECK(std::count_if(image.begin(), image.end(),
                        [](int64_t value) { return value < test::kZero; }) == 0);
  }
}

}  // namespace
}  // namespace weightd
