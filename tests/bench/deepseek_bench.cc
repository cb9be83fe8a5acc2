// What the daemon does at the first sync of a large mixture of experts, with the embedded rule
// file: bind the rules to the trainer's tensors, lower them for every engine rank (which reports
// its parameters), prove and add up the plan.
#include "tests/bench/deepseek_bench.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>

#include "daemon/layout/loader.h"
#include "daemon/plan/plan_compiler.h"

namespace weightd {
namespace {

constexpr int kLayers = 61;
constexpr int kDenseLayers = 3;
constexpr int kExperts = 256;
constexpr int kRanks = 32;
constexpr char kArchitecture[] = "DeepseekV3ForCausalLM";
constexpr char kProfile[] = "vllm-0.32";
constexpr char kConfig[] = R"({"hidden_size": 7168, "num_attention_heads": 128,
  "intermediate_size": 18432, "moe_intermediate_size": 2048, "vocab_size": 129280,
  "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
  "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_hidden_layers": 61,
  "first_k_dense_replace": 3, "tie_word_embeddings": false})";

void AddMlp(TensorTable* table, const std::string& prefix, int64_t width) {
  table->push_back({prefix + "gate_proj.weight", {width, 7168}, DType::kBFloat16});
  table->push_back({prefix + "up_proj.weight", {width, 7168}, DType::kBFloat16});
  table->push_back({prefix + "down_proj.weight", {7168, width}, DType::kBFloat16});
}

TensorTable Tensors() {
  TensorTable table;
  const auto add = [&table](const std::string& name, Shape shape) {
    table.push_back({name, shape, DType::kBFloat16});
  };
  add("model.embed_tokens.weight", {129280, 7168});
  for (int layer = 0; layer < kLayers; ++layer) {
    const std::string prefix = fmt::format("model.layers.{}.", layer);
    add(prefix + "self_attn.q_a_proj.weight", {1536, 7168});
    add(prefix + "self_attn.q_a_layernorm.weight", {1536});
    add(prefix + "self_attn.q_b_proj.weight", {128 * 192, 1536});
    add(prefix + "self_attn.kv_a_proj_with_mqa.weight", {576, 7168});
    add(prefix + "self_attn.kv_a_layernorm.weight", {512});
    add(prefix + "self_attn.kv_b_proj.weight", {128 * 256, 512});
    add(prefix + "self_attn.o_proj.weight", {7168, 128 * 128});
    if (layer < kDenseLayers) {
      AddMlp(&table, prefix + "mlp.", 18432);
    } else {
      add(prefix + "mlp.gate.weight", {kExperts, 7168});
      add(prefix + "mlp.gate.e_score_correction_bias", {kExperts});
      for (int expert = 0; expert < kExperts; ++expert) {
        AddMlp(&table, fmt::format("{}mlp.experts.{}.", prefix, expert), 2048);
      }
      AddMlp(&table, prefix + "mlp.shared_experts.", 2048);
    }
    add(prefix + "input_layernorm.weight", {7168});
    add(prefix + "post_attention_layernorm.weight", {7168});
  }
  add("model.norm.weight", {7168});
  add("lm_head.weight", {129280, 7168});
  return table;
}

// Rank `rank`'s part of every tensor.
RankShards ShardsOf(const TensorTable& table, int rank, int sources, bool by_rows) {
  RankShards shards;
  shards.first.push_back(0);
  for (size_t tensor = 0; tensor < table.size(); ++tensor) {
    Box box = WholeBox(table[tensor].shape);
    if (by_rows) {
      const int64_t rows = box.extent[0];
      const int64_t chunk = (rows + sources - 1) / sources;
      box.origin[0] = std::min(rank * chunk, rows);
      box.extent[0] = std::min((rank + 1) * chunk, rows) - box.origin[0];
    } else if (tensor % static_cast<size_t>(sources) != static_cast<size_t>(rank)) {
      box.extent[0] = 0;
    }
    if (!box.empty()) {
      const auto found = std::find(shards.boxes.begin(), shards.boxes.end(), box);
      shards.box_index.push_back(static_cast<uint32_t>(found - shards.boxes.begin()));
      if (found == shards.boxes.end()) shards.boxes.push_back(box);
    }
    shards.first.push_back(static_cast<uint32_t>(shards.box_index.size()));
  }
  return shards;
}

template <typename T>
T Value(StatusOr<T> value) {
  if (value.ok()) return *std::move(value);
  std::fprintf(stderr, "plan_bench: %s\n", Message(value.status()).c_str());
  std::exit(1);
}

class Stopwatch {
 public:
  /// Seconds of one thread since the last call.
  double Lap() {
    const std::clock_t now = std::clock();
    return static_cast<double>(now - std::exchange(last_, now)) / CLOCKS_PER_SEC;
  }

 private:
  std::clock_t last_ = std::clock();
};

EngineCoordinates At(int rank) {
  return {.tp_rank = rank, .tp_size = kRanks, .ep_rank = rank, .ep_size = kRanks};
}

}  // namespace

int RunDeepseek(int sources, bool by_rows) {
  const TensorTable table = Tensors();
  std::vector<RankShards> shards;
  for (int rank = 0; rank < sources; ++rank) {
    shards.push_back(ShardsOf(table, rank, sources, by_rows));
  }
  const auto registry = Value(LoaderRegistry::Create(""));
  const auto loader = Value(registry->Find(kArchitecture, kProfile));
  // What the engine ranks report: the parameters that the rules derive.
  std::vector<std::vector<ParamInfo>> reported;
  const auto derived = Value(loader->Bind(table, kConfig, kArchitecture, kProfile, {}));
  for (int rank = 0; rank < kRanks; ++rank) {
    reported.push_back(Value(derived->Lower(At(rank), {})).params);
  }
  std::printf("deepseek: %zu source tensors, %d sources, EP %d, %zu parameters per rank\n",
              table.size(), sources, kRanks, reported[0].size());

  Stopwatch watch;
  const auto bound = Value(loader->Bind(table, kConfig, kArchitecture, kProfile, reported[0]));
  const double bind = watch.Lap();
  std::vector<RankLayout> layouts;
  for (int rank = 0; rank < kRanks; ++rank) {
    layouts.push_back(Value(bound->Lower(At(rank), reported[static_cast<size_t>(rank)])));
  }
  const double lower = watch.Lap();
  std::vector<const RankLayout*> pointers;
  for (const RankLayout& layout : layouts) pointers.push_back(&layout);
  const CompiledPlan plan =
      Value(CompilePlan(table, shards, pointers, bound->skipped(), WindowLimits()));
  const double compile = watch.Lap();
  std::printf("bind %.3f s, lower %.3f s, plan %.3f s cpu; boxes=%llu windows=%llu bytes=%llu\n",
              bind, lower, compile, static_cast<unsigned long long>(plan.boxes),
              static_cast<unsigned long long>(plan.windows),
              static_cast<unsigned long long>(plan.bytes));
  std::printf(
      "{\"bench\":\"deepseek\",\"tensors\":%zu,\"sources\":%d,\"by_rows\":%s,\"ep\":%d,"
      "\"boxes\":%llu,\"bind_seconds\":%.3f,\"lower_seconds\":%.3f,\"plan_seconds\":%.3f,"
      "\"cpu_seconds\":%.3f}\n",
      table.size(), sources, by_rows ? "true" : "false", kRanks,
      static_cast<unsigned long long>(plan.boxes), bind, lower, compile, bind + lower + compile);
  return 0;
}

}  // namespace weightd
