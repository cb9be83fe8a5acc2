// Each operation on the example that loaders/README.md gives for it.
#include <catch2/catch.hpp>

#include "daemon/layout/loader.h"
#include "tests/unit/layout/rank_image.h"

namespace weightd {
namespace {

using test::Element;
using test::kZero;

constexpr char kConfig[] =
    R"({"hidden_size": 2, "heads": 4, "kv_heads": 2, "head_dim": 2, "inner": 4, "vocab": 70,
        "experts": 3})";

// The parameters of one rank under one rule for tensors x.0, x.1, ... of the given shapes.
struct Result {
  RankLayout layout;
  std::vector<std::vector<int64_t>> images;
};

Result Run(const std::string& rules, const std::vector<std::pair<std::string, Shape>>& tensors,
           const EngineCoordinates& at) {
  const std::string header =
      "architecture A\nprofile p\nsymbol h = config.hidden_size\nsymbol nq = config.heads\n"
      "symbol nkv = config.kv_heads\nsymbol d = config.head_dim\nsymbol I = config.inner\n"
      "symbol V = config.vocab\nsymbol E = config.experts\nsymbol Im = I\n";
  const auto loader = Loader::Parse(header + rules, "test.rules");
  INFO(loader.status().ToString());
  REQUIRE(loader.ok());
  TensorTable table;
  for (const auto& [name, shape] : tensors) table.push_back({name, shape, DType::kFloat32});
  const auto bound = (*loader)->Bind(table, kConfig, "A", "p", {});
  INFO(bound.status().ToString());
  REQUIRE(bound.ok());
  auto layout = (*bound)->Lower(at, {});
  INFO(layout.status().ToString());
  REQUIRE(layout.ok());
  Result result{*std::move(layout), {}};
  result.images = test::ImageOf(result.layout, table);
  return result;
}

// Row-major elements [begin, end) of tensor t.
std::vector<int64_t> Elements(int64_t t, int64_t begin, int64_t end) {
  std::vector<int64_t> values;
  for (int64_t i = begin; i < end; ++i) values.push_back(Element(t, i));
  return values;
}

std::vector<int64_t> Join(std::initializer_list<std::vector<int64_t>> parts) {
  std::vector<int64_t> all;
  for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

constexpr EngineCoordinates kSecondOfTwo{.tp_rank = 1, .tp_size = 2};

TEST_CASE("rep copies the whole tensor, scalars too") {
  const Result result = Run("(a|b) -> & : rep\n", {{"a", {2, 2}}, {"b", {}}}, kSecondOfTwo);
  CHECK(result.images[0] == Elements(0, 0, 4));
  CHECK(result.images[1] == Elements(1, 0, 1));
}

TEST_CASE("col keeps rows, row keeps columns") {
  const Result result =
      Run("a -> & : col\nb -> & : row\n", {{"a", {4, 2}}, {"b", {2, 4}}}, kSecondOfTwo);
  CHECK(result.layout.params[0].shape == Shape{2, 2});
  CHECK(result.images[0] == Elements(0, 4, 8));
  CHECK(result.images[1] == Join({Elements(1, 2, 4), Elements(1, 6, 8)}));
}

TEST_CASE("vocab pads to 64 rows and fills with zeros") {
  // 70 rows become 128: rank 2 of 4 holds rows 64 to 69, rank 3 none.
  const Result third = Run("a -> & : vocab\n", {{"a", {70, 1}}}, {.tp_rank = 2, .tp_size = 4});
  CHECK(third.layout.params[0].shape == Shape{32, 1});
  CHECK(third.images[0] == Join({Elements(0, 64, 70), std::vector<int64_t>(26, kZero)}));
  const Result last = Run("a -> & : vocab\n", {{"a", {70, 1}}}, {.tp_rank = 3, .tp_size = 4});
  CHECK(last.images[0] == std::vector<int64_t>(32, kZero));
}

TEST_CASE("gqa stacks q, k, v and repeats key and value heads") {
  const std::string rules = "(q|k|v) -> qkv : gqa.$1\n";
  const std::vector<std::pair<std::string, Shape>> tensors = {{"v", {4}}, {"q", {8}}, {"k", {4}}};
  const Result two = Run(rules, tensors, kSecondOfTwo);
  CHECK(two.images[0] == Join({Elements(1, 4, 8), Elements(2, 2, 4), Elements(0, 2, 4)}));
  // Four ranks share two key/value heads: ranks 2 and 3 both hold head 1.
  const Result four = Run(rules, tensors, {.tp_rank = 2, .tp_size = 4});
  CHECK(four.images[0] == Join({Elements(1, 4, 6), Elements(2, 2, 4), Elements(0, 2, 4)}));
}

TEST_CASE("gqa takes its sizes, value heads of another width too") {
  const Result result =
      Run("(q|k|v) -> qkv : gqa(2,1,2,3).$1\n", {{"q", {4}}, {"k", {2}}, {"v", {3}}}, kSecondOfTwo);
  CHECK(result.images[0] == Join({Elements(0, 2, 4), Elements(1, 0, 2), Elements(2, 0, 3)}));
}

TEST_CASE("unfuse-gqa cuts q, k and v out of one tensor") {
  const Result result = Run("a -> & : unfuse-gqa\n", {{"a", {16}}}, kSecondOfTwo);
  CHECK(result.images[0] == Join({Elements(0, 4, 8), Elements(0, 10, 12), Elements(0, 14, 16)}));
}

TEST_CASE("kv keeps this rank's key/value heads") {
  const Result result = Run("a -> & : kv\n", {{"a", {4}}}, {.tp_rank = 2, .tp_size = 4});
  CHECK(result.images[0] == Elements(0, 2, 4));
}

TEST_CASE("merge stacks the ranks' parts, rmerge the whole parts") {
  const std::vector<std::pair<std::string, Shape>> tensors = {{"gate", {4}}, {"up", {4}}};
  const Result split = Run("(gate|up) -> m : merge(I,I).$1\n", tensors, kSecondOfTwo);
  CHECK(split.images[0] == Join({Elements(0, 2, 4), Elements(1, 2, 4)}));
  const Result whole = Run("(gate|up) -> m : rmerge(I,I).$1\n", tensors, kSecondOfTwo);
  CHECK(whole.images[0] == Join({Elements(0, 0, 4), Elements(1, 0, 4)}));
}

TEST_CASE("a merge source may hold several parts") {
  const Result result = Run("a -> m : merge(2,2,4).0-1\nb -> m : merge(2,2,4).2\n",
                            {{"a", {4}}, {"b", {4}}}, kSecondOfTwo);
  CHECK(result.images[0] == Join({Elements(0, 1, 2), Elements(0, 3, 4), Elements(1, 2, 4)}));
}

TEST_CASE("unfuse-merge cuts the parts out of one tensor") {
  const Result result = Run("a -> & : unfuse-merge(I,I)\n", {{"a", {8}}}, kSecondOfTwo);
  CHECK(result.images[0] == Join({Elements(0, 2, 4), Elements(0, 6, 8)}));
}

std::vector<std::pair<std::string, Shape>> Experts() {
  std::vector<std::pair<std::string, Shape>> tensors;
  for (const char* expert : {"0", "1", "2"}) {
    const std::string prefix = std::string("x.") + expert;
    tensors.emplace_back(prefix + ".gate", Shape{4, 2});
    tensors.emplace_back(prefix + ".up", Shape{4, 2});
    tensors.emplace_back(prefix + ".down", Shape{2, 4});
  }
  return tensors;
}

constexpr char kMoe[] = "x.#e.(gate|up) -> w13 : moe(#e).$1\nx.#e.down -> w2 : moe(#e).down\n";

TEST_CASE("moe cuts every expert by tensor parallelism") {
  const Result result = Run(kMoe, Experts(), kSecondOfTwo);
  CHECK(result.layout.params[0].shape == Shape{3, 4, 2});
  CHECK(result.layout.params[1].shape == Shape{3, 2, 2});
  std::vector<int64_t> w13;
  std::vector<int64_t> w2;
  for (int64_t e = 0; e < 3; ++e) {
    w13 = Join({w13, Elements(3 * e, 4, 8), Elements(3 * e + 1, 4, 8)});
    w2 = Join({w2, Elements(3 * e + 2, 2, 4), Elements(3 * e + 2, 6, 8)});
  }
  CHECK(result.images[0] == w13);
  CHECK(result.images[1] == w2);
}

TEST_CASE("moe places whole experts by expert parallelism, the first ranks one more") {
  const EngineCoordinates at{.tp_rank = 1, .tp_size = 2, .ep_rank = 1, .ep_size = 2};
  const Result result = Run(kMoe, Experts(), at);
  CHECK(result.layout.params[0].shape == Shape{1, 8, 2});
  CHECK(result.images[0] == Join({Elements(6, 0, 8), Elements(7, 0, 8)}));
  CHECK(result.images[1] == Elements(8, 0, 8));
}

TEST_CASE("moe3 reads all experts of a layer from one tensor") {
  const Result result = Run("gu -> w13 : moe3.gate_up\ndn -> w2 : moe3.down\n",
                            {{"gu", {3, 8, 2}}, {"dn", {3, 2, 4}}}, {.tp_rank = 1, .tp_size = 2});
  CHECK(result.layout.params[0].shape == Shape{3, 4, 2});
  CHECK(std::vector<int64_t>(result.images[0].begin(), result.images[0].begin() + 8) ==
        Join({Elements(0, 4, 8), Elements(0, 12, 16)}));
  CHECK(std::vector<int64_t>(result.images[1].begin(), result.images[1].begin() + 4) ==
        Join({Elements(1, 2, 4), Elements(1, 6, 8)}));
}

TEST_CASE("moe3.col keeps pairs together, moe3.rank0 leaves zeros on the other ranks") {
  const std::string rules = "b13 -> & : moe3.col(2)\nb2 -> & : moe3.rank0\n";
  const std::vector<std::pair<std::string, Shape>> tensors = {{"b13", {3, 8}}, {"b2", {3, 2}}};
  const Result second = Run(rules, tensors, kSecondOfTwo);
  CHECK(second.images[0] == Join({Elements(0, 4, 8), Elements(0, 12, 16), Elements(0, 20, 24)}));
  CHECK(second.images[1] == std::vector<int64_t>(6, kZero));
  const Result first = Run(rules, tensors, {.tp_rank = 0, .tp_size = 2});
  CHECK(first.images[1] == Elements(1, 0, 6));
  const Result expert =
      Run(rules, tensors, {.tp_rank = 1, .tp_size = 2, .ep_rank = 1, .ep_size = 2});
  CHECK(expert.images[1] == Elements(1, 4, 6));
}

TEST_CASE("T transposes the last two dimensions before anything else") {
  const Result result = Run("a -> & : T col\n", {{"a", {2, 4}}}, kSecondOfTwo);
  CHECK(result.layout.params[0].shape == Shape{2, 2});
  CHECK(result.images[0] ==
        std::vector<int64_t>{Element(0, 2), Element(0, 6), Element(0, 3), Element(0, 7)});
  const Result experts = Run("a -> & : T moe3.row\n", {{"a", {3, 2, 2}}}, kSecondOfTwo);
  CHECK(experts.layout.params[0].shape == Shape{3, 2, 1});
  CHECK(experts.images[0][0] == Element(0, 2));
  CHECK(experts.images[0][1] == Element(0, 3));
}

TEST_CASE("rope turns pairs within a head into halves") {
  const Result result = Run("a -> & : rope(4) rep\n", {{"a", {8}}}, kSecondOfTwo);
  std::vector<int64_t> expected;
  for (const int64_t row : {0, 2, 1, 3, 4, 6, 5, 7}) expected.push_back(Element(0, row));
  CHECK(result.images[0] == expected);
}

TEST_CASE("grouped turns [q.., k, v] per key/value head into q, k, v") {
  // Two groups of two query heads, one key, one value, two rows each.
  const Result result = Run("a -> & : grouped unfuse-gqa\n", {{"a", {16}}}, kSecondOfTwo);
  CHECK(result.images[0] == Join({Elements(0, 8, 12), Elements(0, 12, 14), Elements(0, 14, 16)}));
}

}  // namespace
}  // namespace weightd
