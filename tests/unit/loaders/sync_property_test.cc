// From random FSDP x TP trainers into random engines of the Llama family: rule file, layout, proof
// and plan together, against plain slicing of full tensors. WEIGHTD_TEST_SEED repeats a run.
#include <algorithm>
#include <catch2/catch.hpp>
#include <map>
#include <random>

#include "daemon/layout/loader.h"
#include "tests/unit/layout/matrix.h"
#include "tests/unit/layout/rank_image.h"
#include "tests/unit/plan/plan_testing.h"
#include "tests/unit/test_seed.h"

namespace weightd {
namespace {

using test::Columns;
using test::Filled;
using test::Matrix;
using test::Rows;
using test::Source;
using test::Stack;

constexpr int kRounds = 60;

/// A model of the family, an engine's size and the seed of a trainer.
struct Draw {
  explicit Draw(uint64_t seed) : random(seed) {
    tp = int64_t{1} << Number(0, 3);
    nkv = Number(0, 1) == 0 ? tp * Number(1, 2) : std::max<int64_t>(1, tp >> Number(0, 3));
    nq = std::max(tp, nkv) * Number(1, 2);
    d = Number(1, 4);
    h = Number(1, 6);
    inner = tp * Number(1, 4);
    vocab = Number(1, 150);
    layers = Number(1, 2);
    qwen = Number(0, 1) == 1;
    tied = Number(0, 2) == 0;
  }

  int64_t Number(int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(random);
  }
  std::string Config() const {
    return fmt::format(
        R"({{"hidden_size": {}, "num_attention_heads": {}, "num_key_value_heads": {},
"head_dim": {}, "intermediate_size": {}, "vocab_size": {}, "num_hidden_layers": {},
"tie_word_embeddings": {}}})",
        h, nq, nkv, d, inner, vocab, layers, tied);
  }
  const char* Architecture() const { return qwen ? "Qwen2ForCausalLM" : "LlamaForCausalLM"; }

  std::mt19937_64 random;
  int64_t tp, nkv, nq, d, h, inner, vocab, layers;
  bool qwen, tied;
};

/// Adds the model's tensors, each placed at random on one random mesh.
testing::Trainer MakeTrainer(Draw& draw) {
  std::vector<int> mesh(static_cast<size_t>(draw.Number(1, 2)));
  for (int& size : mesh) size = static_cast<int>(draw.Number(1, 4));
  testing::Trainer trainer(testing::MeshSize(mesh));
  const auto add = [&](const std::string& name, const Shape& shape) {
    std::vector<testing::Placement> placements(mesh.size());
    for (testing::Placement& placement : placements) {
      if (draw.Number(1, 4) == 1) continue;  // Replicate
      placement.dim = static_cast<int>(draw.Number(0, shape.size() - 1));
      placement.strided = draw.Number(1, 4) == 1;
    }
    trainer.Add(name, shape, mesh, placements);
  };
  add("model.embed_tokens.weight", {draw.vocab, draw.h});
  for (int64_t layer = 0; layer < draw.layers; ++layer) {
    const std::string at = fmt::format("model.layers.{}.", layer);
    for (const char* part : {"q", "k", "v"}) {
      const int64_t rows = (part[0] == 'q' ? draw.nq : draw.nkv) * draw.d;
      add(fmt::format("{}self_attn.{}_proj.weight", at, part), {rows, draw.h});
      if (draw.qwen) add(fmt::format("{}self_attn.{}_proj.bias", at, part), {rows});
    }
    add(at + "self_attn.o_proj.weight", {draw.h, draw.nq * draw.d});
    add(at + "mlp.gate_proj.weight", {draw.inner, draw.h});
    add(at + "mlp.up_proj.weight", {draw.inner, draw.h});
    add(at + "mlp.down_proj.weight", {draw.h, draw.inner});
    add(at + "input_layernorm.weight", {draw.h});
    add(at + "post_attention_layernorm.weight", {draw.h});
  }
  add("model.norm.weight", {draw.h});
  if (!draw.tied) add("lm_head.weight", {draw.vocab, draw.h});
  return trainer;
}

/// Rows of one rank after padding to a multiple of 64 with zeros.
Matrix VocabPart(const Matrix& whole, int64_t rank, int64_t tp) {
  const int64_t rows = (whole.rows + 63) / 64 * 64 / tp;
  Matrix part = Filled(rows, whole.columns, test::kZero);
  const int64_t begin = std::min(rank * rows, whole.rows);
  const Matrix real = Rows(whole, begin, std::min(rows, whole.rows - begin));
  std::copy(real.values.begin(), real.values.end(), part.values.begin());
  return part;
}

/// What one rank of a tensor-parallel engine holds.
std::map<std::string, Matrix> Reference(const Draw& draw, const TensorTable& table, int64_t rank) {
  const auto source = [&table](const std::string& name) { return Source(table, name); };
  const int64_t q_rows = draw.nq / draw.tp * draw.d;
  const int64_t copies = std::max<int64_t>(1, draw.tp / draw.nkv);
  const int64_t kv_rows = std::max<int64_t>(1, draw.nkv / draw.tp) * draw.d;
  const int64_t inner = draw.inner / draw.tp;
  std::map<std::string, Matrix> params;
  params["model.embed_tokens.weight"] =
      VocabPart(source("model.embed_tokens.weight"), rank, draw.tp);
  for (int64_t layer = 0; layer < draw.layers; ++layer) {
    const std::string at = fmt::format("model.layers.{}.", layer);
    for (const std::string kind : {".weight", ".bias"}) {
      if (kind == ".bias" && !draw.qwen) continue;
      const std::string attention = at + "self_attn.";
      params[attention + "qkv_proj" + kind] =
          Stack({Rows(source(attention + "q_proj" + kind), rank * q_rows, q_rows),
                 Rows(source(attention + "k_proj" + kind), rank / copies * kv_rows, kv_rows),
                 Rows(source(attention + "v_proj" + kind), rank / copies * kv_rows, kv_rows)});
    }
    params[at + "self_attn.o_proj.weight"] =
        Columns(source(at + "self_attn.o_proj.weight"), rank * q_rows, q_rows);
    params[at + "mlp.gate_up_proj.weight"] =
        Stack({Rows(source(at + "mlp.gate_proj.weight"), rank * inner, inner),
               Rows(source(at + "mlp.up_proj.weight"), rank * inner, inner)});
    params[at + "mlp.down_proj.weight"] =
        Columns(source(at + "mlp.down_proj.weight"), rank * inner, inner);
    for (const char* norm : {"input_layernorm.weight", "post_attention_layernorm.weight"}) {
      params[at + norm] = source(at + norm);
    }
  }
  params["model.norm.weight"] = source("model.norm.weight");
  if (!draw.tied) params["lm_head.weight"] = VocabPart(source("lm_head.weight"), rank, draw.tp);
  return params;
}

TEST_CASE("random syncs of the Llama family land what slicing full tensors gives") {
  const auto registry = LoaderRegistry::Create("");
  REQUIRE(registry.ok());
  for (uint64_t round = 0; round < kRounds; ++round) {
    Draw draw(TestSeed() + round);
    const testing::Trainer trainer = MakeTrainer(draw);
    INFO("WEIGHTD_TEST_SEED=" << TestSeed() + round << " tp=" << draw.tp << " " << draw.Config());
    const auto loader = (*registry)->Find(draw.Architecture(), "vllm-0.32");
    REQUIRE(loader.ok());
    const auto bound =
        (*loader)->Bind(trainer.table(), draw.Config(), draw.Architecture(), "vllm-0.32", {});
    INFO(bound.status().ToString());
    REQUIRE(bound.ok());
    const auto grid = trainer.Grid(draw.Number(0, 1) == 0 ? kMinStripeBytes : 8);
    REQUIRE(grid.ok());
    const WindowLimits limits{static_cast<uint64_t>(draw.Number(1, 2000)),
                              static_cast<uint32_t>(draw.Number(1, 50))};
    for (int rank = 0; rank < draw.tp; ++rank) {
      const auto layout =
          (*bound)->Lower({.tp_rank = rank, .tp_size = static_cast<int>(draw.tp)}, {});
      INFO("rank " << rank << " " << layout.status().ToString());
      REQUIRE(layout.ok());
      const auto images = test::ImageOf(*layout, trainer.table());
      const auto reference = Reference(draw, trainer.table(), rank);
      REQUIRE(images.size() == reference.size());
      for (size_t i = 0; i < images.size(); ++i) {
        INFO(layout->params[i].name);
        REQUIRE(images[i] == reference.at(layout->params[i].name).values);
      }
      REQUIRE(CheckCoverage(trainer.table(), *layout).ok());
      const RankPlan plan = EnumerateRank(trainer.table(), *grid, *layout, limits);
      REQUIRE(testing::FaultOf(trainer.table(), trainer.shards(), *layout, plan, limits) == "");
    }
  }
}

}  // namespace
}  // namespace weightd
