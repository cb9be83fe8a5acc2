// How fast a plan is compiled: the grid over all sources plus one engine rank's own boxes.
//
// Model: decoder layers of nine tensors (q, k, v, o, gate, up, down, two norms) and an embedding,
// float32. Trainer: FSDP over `sources` ranks, dimension 0 in chunks, the norms too. Engine: tensor
// parallel over `tp` ranks in bfloat16, merged qkv and gate_up, 8 key-value heads shared where tp
// exceeds them, row-parallel o and down, norms whole, vocabulary padded to 64. All engine ranks
// have equally many boxes, so rank tp - 1, which also has the zero fill, is the largest.
// Usage: plan_bench [tensors=100000] [sources=64] [tp=32]
//        plan_bench deepseek [sources=8] [rows|whole]: rules and plan of DeepSeek V3, see
//        deepseek_bench.h
// Seconds are CPU seconds of one thread, and wall seconds beside them; MB (10^6 bytes) is the
// greatest resident size of the process so far, inputs included.
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <string>
#include <string_view>

#include "daemon/plan/transfer_plan.h"
#include "tests/bench/deepseek_bench.h"

namespace weightd {
namespace {

constexpr int64_t kHidden = 4096;
constexpr int64_t kIntermediate = 14336;
constexpr int64_t kHeads = 32;
constexpr int64_t kKeyValueHeads = 8;
constexpr int64_t kHeadSize = 128;
constexpr int64_t kVocabulary = 128250;
constexpr int64_t kPaddedVocabulary = 128256;
constexpr uint32_t kTensorsPerLayer = 9;

struct Input {
  TensorTable table;
  std::vector<RankShards> shards;
  RankLayout layout;
};

Box Block(int64_t row, int64_t rows, int64_t column, int64_t columns) {
  return {{row, column}, {rows, columns}};
}

/// Adds a tensor, and rank r's chunk of dimension 0 to every rank.
uint32_t AddTensor(Input& input, std::string name, const Shape& shape) {
  input.table.push_back({std::move(name), shape, DType::kFloat32});
  const auto ranks = static_cast<int64_t>(input.shards.size());
  const int64_t chunk = (shape[0] + ranks - 1) / ranks;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    RankShards& held = input.shards[static_cast<size_t>(rank)];
    Box box = WholeBox(shape);
    box.origin[0] = std::min(rank * chunk, shape[0]);
    box.extent[0] = std::min((rank + 1) * chunk, shape[0]) - box.origin[0];
    const auto found = std::find(held.boxes.begin(), held.boxes.end(), box);
    held.box_index.push_back(static_cast<uint32_t>(found - held.boxes.begin()));
    if (found == held.boxes.end()) held.boxes.push_back(box);
    held.first.push_back(static_cast<uint32_t>(held.box_index.size()));
  }
  return static_cast<uint32_t>(input.table.size() - 1);
}

uint32_t AddParam(Input& input, std::string name, const Shape& shape) {
  input.layout.params.push_back({std::move(name), shape, DType::kBFloat16});
  return static_cast<uint32_t>(input.layout.params.size() - 1);
}

void AddWrite(Input& input, uint32_t tensor, uint32_t param, const Box& source, const Box& target) {
  input.layout.writes.push_back({tensor, param, false, {0, 1}, source, target});
}

void AddNorm(Input& input, const std::string& name) {
  const uint32_t tensor = AddTensor(input, name, {kHidden});
  const uint32_t param = AddParam(input, name, {kHidden});
  AddWrite(input, tensor, param, WholeBox({kHidden}), WholeBox({kHidden}));
}

/// A parameter that holds `rank`'s rows of several tensors, one below the other.
struct Part {
  const char* name;
  int64_t rows;      ///< of the tensor
  int64_t my_first;  ///< first row that this engine rank takes
  int64_t my_rows;
};
void AddMerged(Input& input, const std::string& prefix, const char* merged,
               std::initializer_list<Part> parts) {
  int64_t rows = 0;
  for (const Part& part : parts) rows += part.my_rows;
  const uint32_t param = AddParam(input, prefix + merged, {rows, kHidden});
  int64_t row = 0;
  for (const Part& part : parts) {
    const uint32_t tensor = AddTensor(input, prefix + part.name, {part.rows, kHidden});
    AddWrite(input, tensor, param, Block(part.my_first, part.my_rows, 0, kHidden),
             Block(row, part.my_rows, 0, kHidden));
    row += part.my_rows;
  }
}

/// A row-parallel parameter: the rank's columns of a tensor.
void AddRowParallel(Input& input, const std::string& name, int64_t columns, int64_t rank,
                    int64_t tp) {
  const int64_t mine = columns / tp;
  const uint32_t tensor = AddTensor(input, name, {kHidden, columns});
  const uint32_t param = AddParam(input, name, {kHidden, mine});
  AddWrite(input, tensor, param, Block(0, kHidden, rank * mine, mine), Block(0, kHidden, 0, mine));
}

void AddLayer(Input& input, size_t layer, int64_t rank, int64_t tp) {
  const std::string prefix = "model.layers." + std::to_string(layer) + ".";
  const int64_t query = kHeads * kHeadSize;
  const int64_t key = kKeyValueHeads * kHeadSize;
  const int64_t my_key = std::max(key / tp, kHeadSize);
  const int64_t key_first = rank * std::min(tp, kKeyValueHeads) / tp * my_key;
  AddNorm(input, prefix + "input_layernorm.weight");
  AddMerged(input, prefix, "self_attn.qkv_proj.weight",
            {{"self_attn.q_proj.weight", query, rank * query / tp, query / tp},
             {"self_attn.k_proj.weight", key, key_first, my_key},
             {"self_attn.v_proj.weight", key, key_first, my_key}});
  AddRowParallel(input, prefix + "self_attn.o_proj.weight", query, rank, tp);
  AddNorm(input, prefix + "post_attention_layernorm.weight");
  const int64_t mine = kIntermediate / tp;
  AddMerged(input, prefix, "mlp.gate_up_proj.weight",
            {{"mlp.gate_proj.weight", kIntermediate, rank * mine, mine},
             {"mlp.up_proj.weight", kIntermediate, rank * mine, mine}});
  AddRowParallel(input, prefix + "mlp.down_proj.weight", kIntermediate, rank, tp);
}

void AddEmbedding(Input& input, int64_t rank, int64_t tp) {
  const int64_t mine = kPaddedVocabulary / tp;
  const int64_t first = rank * mine;
  const int64_t real = std::clamp<int64_t>(kVocabulary - first, 0, mine);
  const std::string name = "model.embed_tokens.weight";
  const uint32_t tensor = AddTensor(input, name, {kVocabulary, kHidden});
  const uint32_t param = AddParam(input, name, {mine, kHidden});
  AddWrite(input, tensor, param, Block(first, real, 0, kHidden), Block(0, real, 0, kHidden));
  if (real < mine) {
    input.layout.writes.push_back(
        {0, param, true, {}, Box(), Block(real, mine - real, 0, kHidden)});
  }
}

Input MakeInput(size_t tensors, size_t sources, int64_t tp) {
  Input input;
  input.shards.resize(sources);
  for (RankShards& held : input.shards) held.first.push_back(0);
  AddEmbedding(input, tp - 1, tp);
  for (size_t layer = 0; input.table.size() + kTensorsPerLayer <= tensors; ++layer) {
    AddLayer(input, layer, tp - 1, tp);
  }
  while (input.table.size() < tensors)
    AddNorm(input, "extra." + std::to_string(input.table.size()));
  return input;
}

double PeakMegabytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) * 1024 / 1e6;
}

/// Runs fn and prints how long it took.
struct Timing {
  double cpu = 0;
  double wall = 0;
};
template <typename Fn>
Timing Measure(const char* what, Fn fn) {
  const auto wall = std::chrono::steady_clock::now();
  const std::clock_t cpu = std::clock();
  fn();
  const Timing timing = {
      static_cast<double>(std::clock() - cpu) / CLOCKS_PER_SEC,
      std::chrono::duration<double>(std::chrono::steady_clock::now() - wall).count()};
  std::printf("%-34s %7.3f s cpu  %7.3f s wall  %7.1f MB\n", what, timing.cpu, timing.wall,
              PeakMegabytes());
  return timing;
}

void Require(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "plan_bench: %s\n", Message(status).c_str());
  std::exit(1);
}

int Run(size_t tensors, size_t sources, int64_t tp) {
  std::printf("plan: %zu source tensors, %zu sources, TP %lld; seconds of one core, peak MB\n",
              tensors, sources, static_cast<long long>(tp));
  const Input input = MakeInput(tensors, sources, tp);
  const WindowLimits limits;
  std::printf("inputs alone: %.1f MB, %zu writes of the largest engine rank\n", PeakMegabytes(),
              input.layout.writes.size());
  StatusOr<SourceGrid> grid = Error(StatusCode::kInternal, reason::kInternal, "", "not built");
  const Timing built = Measure("grid with proof of the sources",
                               [&] { grid = SourceGrid::Build(input.table, input.shards); });
  Require(grid.status());
  Status covered;
  const Timing proven = Measure("proof of the engine rank",
                                [&] { covered = CheckCoverage(input.table, input.layout); });
  Require(covered);
  RankPlan plan;
  const Timing listed = Measure("boxes of the engine rank", [&] {
    plan = EnumerateRank(input.table, *grid, input.layout, limits);
  });
  Digest128 digest{};
  const std::array<const RankLayout*, 1> layouts = {&input.layout};
  Measure("digest of sources and this rank",
          [&] { digest = PlanDigest(input.table, input.shards, layouts, limits); });
  std::printf("tilings=%zu copies=%zu windows=%zu bytes=%llu digest=%02x%02x...\n",
              grid->num_tilings(), plan.copies.size(), plan.windows.size(),
              static_cast<unsigned long long>(plan.bytes), digest[0], digest[1]);
  std::printf(
      "{\"bench\":\"plan\",\"tensors\":%zu,\"sources\":%zu,\"tp\":%lld,\"copies\":%zu,"
      "\"cpu_seconds\":%.3f,\"wall_seconds\":%.3f,\"peak_mb\":%.1f}\n",
      tensors, sources, static_cast<long long>(tp), plan.copies.size(),
      built.cpu + proven.cpu + listed.cpu, built.wall + proven.wall + listed.wall, PeakMegabytes());
  return 0;
}

}  // namespace
}  // namespace weightd

int main(int argc, char** argv) {
  const auto number = [&](int i, long long fallback) {
    return argc > i ? std::strtoll(argv[i], nullptr, 10) : fallback;
  };
  if (argc > 1 && std::string_view(argv[1]) == "deepseek") {
    const long long sources = number(2, 8);
    const bool by_rows = argc <= 3 || std::string_view(argv[3]) == "rows";
    if (sources >= 1 && sources <= 1024) {
      return weightd::RunDeepseek(static_cast<int>(sources), by_rows);
    }
  }
  const long long tensors = number(1, 100000);
  const long long sources = number(2, 64);
  const long long tp = number(3, 32);
  if (tensors < 1 || sources < 1 || tp < 1 || tp > 32 || (tp & (tp - 1)) != 0) {
    std::fprintf(stderr, "usage: plan_bench [tensors >= 1] [sources >= 1] [tp = 1, 2, ... 32]\n");
    return 2;
  }
  return weightd::Run(static_cast<size_t>(tensors), static_cast<size_t>(sources), tp);
}
