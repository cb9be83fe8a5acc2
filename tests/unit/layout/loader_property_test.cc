// Random models against a reference that slices full tensors the way an engine's weight loaders do:
// narrow the checkpoint's tensor, copy it into a view of the parameter. WEIGHTD_TEST_SEED repeats a
// run.
#include <catch2/catch.hpp>
#include <map>
#include <random>

#include "daemon/layout/loader.h"
#include "tests/unit/layout/matrix.h"
#include "tests/unit/layout/rank_image.h"
#include "tests/unit/test_seed.h"

namespace weightd {
namespace {

using test::Columns;
using test::Filled;
using test::Matrix;
using test::Rows;
using test::Source;
using test::Stack;
using test::Transposed;

constexpr char kRules[] = R"(
architecture A
profile p
symbol nq = config.nq
symbol nkv = config.nkv
symbol d = config.d
symbol I = config.I
symbol V = config.V
symbol E = config.E
symbol Im = config.Im
emb -> & : vocab
(q|k|v)(.w|.b) -> qkv$2 : gqa.$1
fused_qkv -> & : unfuse-gqa
o -> & : row
conv_o -> & : T row
(gate|up) -> gate_up : merge(I,I).$1
norm -> & : rep
x.#e.(gate|up) -> w13 : moe(#e).$1
x.#e.down -> w2 : moe(#e).down
x3.gate_up -> w13_3 : moe3.gate_up
x3.down -> w2_3 : moe3.down
)";

struct Model {
  int64_t nq, nkv, d, h, I, V, E, Im;
};

TensorTable TableOf(const Model& m) {
  TensorTable table;
  const auto add = [&table](const std::string& name, Shape shape) {
    table.push_back({name, shape, DType::kFloat32});
  };
  add("emb", {m.V, m.h});
  add("q.w", {m.nq * m.d, m.h});
  add("k.w", {m.nkv * m.d, m.h});
  add("v.w", {m.nkv * m.d, m.h});
  add("q.b", {m.nq * m.d});
  add("k.b", {m.nkv * m.d});
  add("v.b", {m.nkv * m.d});
  add("fused_qkv", {(m.nq + 2 * m.nkv) * m.d, m.h});
  add("o", {m.h, m.nq * m.d});
  add("conv_o", {m.nq * m.d, m.h});
  add("gate", {m.I, m.h});
  add("up", {m.I, m.h});
  add("norm", {m.h});
  for (int64_t e = 0; e < m.E; ++e) {
    const std::string prefix = "x." + std::to_string(e);
    add(prefix + ".gate", {m.Im, m.h});
    add(prefix + ".up", {m.Im, m.h});
    add(prefix + ".down", {m.h, m.Im});
  }
  add("x3.gate_up", {m.E, 2 * m.Im, m.h});
  add("x3.down", {m.E, m.h, m.Im});
  return table;
}

// One rank's parameters as the engine's loaders fill them.
std::map<std::string, Matrix> Reference(const Model& m, const TensorTable& table,
                                        const EngineCoordinates& at) {
  std::map<std::string, Matrix> params;
  const int64_t tp = at.tp_size;
  const int64_t r = at.tp_rank;
  const auto source = [&table](const std::string& name) { return Source(table, name); };
  // VocabParallelEmbedding: pad to a multiple of 64, load the rows below V, zero the rest.
  const int64_t per_rank = (m.V + 63) / 64 * 64 / tp;
  Matrix embedding = Filled(per_rank, m.h, test::kZero);
  for (int64_t row = 0; row < per_rank && r * per_rank + row < m.V; ++row) {
    const Matrix one = Rows(source("emb"), r * per_rank + row, 1);
    std::copy(one.values.begin(), one.values.end(), embedding.values.begin() + row * m.h);
  }
  params["emb"] = embedding;
  // QKVParallelLinear: a rank holds nq/tp query heads and max(1, nkv/tp) key/value heads.
  const int64_t q_rows = m.nq / tp * m.d;
  const int64_t replicas = tp > m.nkv ? tp / m.nkv : 1;
  const int64_t kv_rows = (tp > m.nkv ? 1 : m.nkv / tp) * m.d;
  for (const std::string suffix : {".w", ".b"}) {
    params["qkv" + suffix] = Stack({Rows(source("q" + suffix), r * q_rows, q_rows),
                                    Rows(source("k" + suffix), r / replicas * kv_rows, kv_rows),
                                    Rows(source("v" + suffix), r / replicas * kv_rows, kv_rows)});
  }
  const Matrix fused = source("fused_qkv");
  params["fused_qkv"] = Stack(
      {Rows(fused, r * q_rows, q_rows), Rows(fused, m.nq * m.d + r / replicas * kv_rows, kv_rows),
       Rows(fused, (m.nq + m.nkv) * m.d + r / replicas * kv_rows, kv_rows)});
  params["o"] = Columns(source("o"), r * q_rows, q_rows);
  params["conv_o"] = Columns(Transposed(source("conv_o")), r * q_rows, q_rows);
  params["gate_up"] = Stack(
      {Rows(source("gate"), r * m.I / tp, m.I / tp), Rows(source("up"), r * m.I / tp, m.I / tp)});
  params["norm"] = source("norm");
  // FusedMoE: expert parallel ranks hold whole experts, the first E % ep ranks one more.
  const bool whole = at.ep_size > 1;
  const int64_t part = whole ? m.Im : m.Im / tp;
  const int64_t offset = whole ? 0 : r * part;
  int64_t first = 0;
  for (int rank = 0; rank < at.ep_rank; ++rank)
    first += m.E / at.ep_size + (rank < m.E % at.ep_size);
  const int64_t held = m.E / at.ep_size + (at.ep_rank < m.E % at.ep_size);
  for (const std::string name : {"w13", "w2", "w13_3", "w2_3"}) params[name] = {};
  for (int64_t e = first; e < first + held; ++e) {
    const std::string prefix = "x." + std::to_string(e);
    const Matrix gate_up = Rows(source("x3.gate_up"), e * 2 * m.Im, 2 * m.Im);
    const Matrix down = Rows(source("x3.down"), e * m.h, m.h);
    params["w13"] = Stack({params["w13"], Rows(source(prefix + ".gate"), offset, part),
                           Rows(source(prefix + ".up"), offset, part)});
    params["w2"] = Stack({params["w2"], Columns(source(prefix + ".down"), offset, part)});
    params["w13_3"] =
        Stack({params["w13_3"], Rows(gate_up, offset, part), Rows(gate_up, m.Im + offset, part)});
    params["w2_3"] = Stack({params["w2_3"], Columns(down, offset, part)});
  }
  return params;
}

TEST_CASE("random models lower to what slicing full tensors gives") {
  INFO("WEIGHTD_TEST_SEED=" << TestSeed());
  std::mt19937_64 random(TestSeed());
  const auto pick = [&random](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  const auto loader = Loader::Parse(kRules, "property.rules");
  INFO(loader.status().ToString());
  REQUIRE(loader.ok());
  for (int round = 0; round < 60; ++round) {
    const int64_t tp = int64_t{1} << pick(0, 3);
    const int64_t nkv = pick(0, 1) == 0 ? tp * pick(1, 2) : std::max<int64_t>(1, tp >> pick(0, 3));
    const int64_t nq = std::max(tp, nkv) * pick(1, 3);
    const Model m{.nq = nq,
                  .nkv = nkv,
                  .d = pick(1, 4),
                  .h = pick(1, 5),
                  .I = tp * pick(1, 4),
                  .V = pick(1, 200),
                  .E = tp + pick(0, 5),
                  .Im = tp * pick(1, 3)};
    const TensorTable table = TableOf(m);
    const std::string config =
        fmt::format(R"({{"nq": {}, "nkv": {}, "d": {}, "I": {}, "V": {}, "E": {}, "Im": {}}})",
                    m.nq, m.nkv, m.d, m.I, m.V, m.E, m.Im);
    const auto bound = (*loader)->Bind(table, config, "A", "p", {});
    INFO(config << " tp=" << tp << " " << bound.status().ToString());
    REQUIRE(bound.ok());
    const bool expert_parallel = pick(0, 1) == 1;
    for (int rank = 0; rank < tp; ++rank) {
      EngineCoordinates at{.tp_rank = rank, .tp_size = static_cast<int>(tp)};
      if (expert_parallel) at.ep_rank = at.tp_rank;
      if (expert_parallel) at.ep_size = at.tp_size;
      const auto layout = (*bound)->Lower(at, {});
      INFO("rank " << rank << " " << layout.status().ToString());
      REQUIRE(layout.ok());
      const auto images = test::ImageOf(*layout, table);
      const auto reference = Reference(m, table, at);
      REQUIRE(layout->params.size() == reference.size());
      for (size_t i = 0; i < images.size(); ++i) {
        INFO(layout->params[i].name);
        REQUIRE(images[i] == reference.at(layout->params[i].name).values);
      }
    }
  }
}

}  // namespace
}  // namespace weightd
