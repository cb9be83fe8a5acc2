// The host path alone: a float32 Llama of about 268 million parameters, split by rows over 4 actor
// ranks, into two bfloat16 engine ranks with merged qkv and gate_up parameters, through
// ShmTransport over memfd mappings. The shapes are those of floor_host.py; run both and divide.
//
//   shm_bench [--isa portable|avx2|avx512] [--threads N] [--rounds N]
//
// Prints one JSON object. All times are medians of wall seconds over both engine ranks together:
//   transfer_plain_seconds   Transfer without digests
//   transfer_seconds         Transfer with the source digest
//   verify_seconds           Verify: every landed byte read again
//   verified_seconds         transfer_seconds + verify_seconds of the same round, median of sums
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/device/mapping.h"
#include "daemon/layout/digest.h"
#include "daemon/plan/transfer_plan.h"
#include "daemon/transport/shm/shm_transport.h"

namespace weightd {
namespace {

constexpr int64_t kVocab = 32000, kHidden = 1024, kIntermediate = 2816;
constexpr int64_t kHeads = 16, kKvHeads = 8, kHeadDim = 64;
constexpr int kLayers = 17;
constexpr uint32_t kRanks = 4;
constexpr int kTp = 2;

[[noreturn]] void Die(const std::string& message) {
  std::fprintf(stderr, "shm_bench: %s\n", message.c_str());
  std::exit(1);
}

// A model, its shards and its engine ranks in shared memory.
class Model {
 public:
  Model() : layouts_(kTp), plans_(kTp) {
    AddTensor("model.embed_tokens.weight", {kVocab, kHidden}, "model.embed_tokens.weight", 0);
    for (int layer = 0; layer < kLayers; ++layer) AddLayer(layer);
    AddTensor("model.norm.weight", {kHidden}, "model.norm.weight", -1);
    AddTensor("lm_head.weight", {kVocab, kHidden}, "lm_head.weight", 0);
    MakeShards();
    MakePlans();
  }

  BoundPlan& plan() { return bound_; }
  uint64_t bytes_read() const { return bytes_read_; }
  uint64_t bytes_landed() const { return plans_[0].bytes + plans_[1].bytes; }

 private:
  void AddLayer(int layer) {
    const std::string at = "model.layers." + std::to_string(layer) + ".";
    const std::string attention = at + "self_attn.", mlp = at + "mlp.";
    const std::string qkv = attention + "qkv_proj.weight", gate_up = mlp + "gate_up_proj.weight";
    AddTensor(attention + "q_proj.weight", {kHeads * kHeadDim, kHidden}, qkv, 0);
    AddTensor(attention + "k_proj.weight", {kKvHeads * kHeadDim, kHidden}, qkv, 0);
    AddTensor(attention + "v_proj.weight", {kKvHeads * kHeadDim, kHidden}, qkv, 0);
    AddTensor(attention + "o_proj.weight", {kHidden, kHeads * kHeadDim},
              attention + "o_proj.weight", 1);
    AddTensor(mlp + "gate_proj.weight", {kIntermediate, kHidden}, gate_up, 0);
    AddTensor(mlp + "up_proj.weight", {kIntermediate, kHidden}, gate_up, 0);
    AddTensor(mlp + "down_proj.weight", {kHidden, kIntermediate}, mlp + "down_proj.weight", 1);
    for (const char* norm : {"input_layernorm.weight", "post_attention_layernorm.weight"}) {
      AddTensor(at + norm, {kHidden}, at + norm, -1);
    }
  }

  // Appends the tensor to `param` of both engine ranks, cut along `cut_dim` (-1: whole).
  void AddTensor(const std::string& name, const Shape& shape, const std::string& param,
                 int cut_dim) {
    const auto position = static_cast<uint32_t>(table_.size());
    table_.push_back({name, shape, DType::kFloat32});
    for (int tp = 0; tp < kTp; ++tp) {
      RankLayout& layout = layouts_[static_cast<size_t>(tp)];
      layout.coordinates.tp_rank = tp;
      layout.coordinates.tp_size = kTp;
      Write write;
      write.tensor = position;
      write.source_dim.fill(-1);
      for (int d = 0; d < shape.size(); ++d) {
        write.source_dim[static_cast<size_t>(d)] = static_cast<int8_t>(d);
      }
      write.source = WholeBox(shape);
      if (cut_dim >= 0) {
        write.source.extent[cut_dim] /= kTp;
        write.source.origin[cut_dim] = tp * write.source.extent[cut_dim];
      }
      write.target = WholeBox(write.source.extent);
      if (!layout.params.empty() && layout.params.back().name == param) {
        write.target.origin[0] = layout.params.back().shape[0];
        layout.params.back().shape[0] += write.target.extent[0];
      } else {
        layout.params.push_back(
            {param, write.target.extent, DType::kBFloat16, ParamKind::kRaw, ""});
      }
      write.param = static_cast<uint32_t>(layout.params.size() - 1);
      layout.writes.push_back(write);
    }
  }

  std::byte* Allocate(uint64_t size_bytes) {
    ScopedFd fd(memfd_create("shm_bench", MFD_CLOEXEC));
    if (!fd.valid() || ftruncate(fd.get(), static_cast<off_t>(size_bytes)) != 0) {
      Die("cannot make shared memory: lower ulimit or free memory");
    }
    auto mapping = Mapping::Create(std::move(fd), size_bytes, Mapping::Access::kWrite, "bench");
    if (!mapping.ok()) Die(Message(mapping.status()));
    std::memset(mapping->data(), 0, size_bytes);
    mappings_.push_back(std::move(*mapping));
    return mappings_.back().data();
  }

  void MakeShards() {
    shards_.resize(kRanks);
    bound_.sources.resize(kRanks);
    uint64_t seed = 1;
    for (uint32_t r = 0; r < kRanks; ++r) {
      shards_[r].first.push_back(0);
      for (const TensorInfo& tensor : table_) {
        Box held = WholeBox(tensor.shape);
        held.extent[0] /= kRanks;
        held.origin[0] = static_cast<int64_t>(r) * held.extent[0];
        const auto count = static_cast<uint64_t>(held.num_elements());
        std::byte* base = Allocate(count * 4);
        for (uint64_t i = 0; i < count; ++i) {
          const uint32_t bits = 0x3c000000U + (static_cast<uint32_t>(Mix64(++seed)) & 0x80ffffffU);
          std::memcpy(base + 4 * i, &bits, 4);
        }
        bytes_read_ += count * 4;
        shards_[r].box_index.push_back(static_cast<uint32_t>(shards_[r].boxes.size()));
        shards_[r].boxes.push_back(held);
        shards_[r].first.push_back(static_cast<uint32_t>(shards_[r].box_index.size()));
        bound_.sources[r].push_back({base, RowMajorStrides(held.extent), false});
      }
    }
    bound_.table = &table_;
    bound_.shards = shards_;
  }

  void MakePlans() {
    const auto grid = SourceGrid::Build(table_, shards_);
    if (!grid.ok()) Die(Message(grid.status()));
    for (size_t tp = 0; tp < layouts_.size(); ++tp) {
      plans_[tp] = EnumerateRank(table_, *grid, layouts_[tp], WindowLimits());
      BoundTarget target;
      target.layout = &layouts_[tp];
      target.plan = &plans_[tp];
      target.label = "engine e0 tp " + std::to_string(tp);
      for (const ParamInfo& param : layouts_[tp].params) {
        target.params.push_back({Allocate(static_cast<uint64_t>(NumElements(param.shape)) * 2),
                                 RowMajorStrides(param.shape), false});
      }
      bound_.targets.push_back(std::move(target));
    }
  }

  TensorTable table_;
  std::vector<RankShards> shards_;
  std::vector<RankLayout> layouts_;
  std::vector<RankPlan> plans_;
  std::vector<Mapping> mappings_;
  BoundPlan bound_;
  uint64_t bytes_read_ = 0;
};

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Runs Transfer or Verify on both engine ranks; returns seconds and appends the digests.
double Run(ShmTransport& transport, Model& model, bool verify, std::vector<RankDigests>& digests) {
  const auto begin = std::chrono::steady_clock::now();
  for (size_t tp = 0; tp < kTp; ++tp) {
    RunControl control;
    auto result = verify ? transport.Verify(model.plan(), tp, control)
                         : transport.Transfer(model.plan(), tp, control);
    if (!result.ok()) Die(Message(result.status()));
    digests.push_back(std::move(*result));
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

struct Times {
  std::vector<double> plain, transfer, verify, verified;
};

Times Measure(Model& model, ShmOptions options, int rounds) {
  ShmTransport transport(options);
  options.digest = false;
  ShmTransport plain(options);
  Times times;
  constexpr int kWarmup = 2;
  for (int round = 0; round < rounds + kWarmup; ++round) {
    std::vector<RankDigests> unused, sent, landed;
    const double bare = Run(plain, model, false, unused);
    const double transfer = Run(transport, model, false, sent);
    const double verify = Run(transport, model, true, landed);
    if (sent != landed) Die("digests differ");
    if (round < kWarmup) continue;
    times.plain.push_back(bare);
    times.transfer.push_back(transfer);
    times.verify.push_back(verify);
    times.verified.push_back(transfer + verify);
  }
  return times;
}

int Main(int argc, char** argv) {
  ShmOptions options;
  options.num_threads = 2;
  options.kernels = &host::BestKernels();
  int rounds = 9;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string_view key = argv[i], value = argv[i + 1];
    if (key == "--isa") {
      for (const host::Isa isa : {host::Isa::kPortable, host::Isa::kAvx2, host::Isa::kAvx512}) {
        if (Name(isa) == value && Supported(isa)) options.kernels = &host::KernelsFor(isa);
      }
      if (Name(options.kernels->isa) != value) Die("this CPU has no " + std::string(value));
    } else if (key == "--threads") {
      options.num_threads = std::max(1, std::atoi(argv[i + 1]));
    } else if (key == "--rounds") {
      rounds = std::max(1, std::atoi(argv[i + 1]));
    } else {
      Die("unknown option " + std::string(key) + "; known: --isa, --threads, --rounds");
    }
  }
  Model model;
  const Times times = Measure(model, options, rounds);
  const auto best = [](const std::vector<double>& v) {
    return *std::min_element(v.begin(), v.end());
  };
  std::printf(
      "{\"isa\": \"%s\", \"threads\": %d, \"rounds\": %d, \"bytes_read\": %llu, "
      "\"bytes_landed\": %llu,\n \"transfer_plain_seconds\": %.4f, \"transfer_seconds\": %.4f, "
      "\"verify_seconds\": %.4f, \"verified_seconds\": %.4f,\n \"best\": {\"transfer_plain\": "
      "%.4f, "
      "\"transfer\": %.4f, \"verify\": %.4f, \"verified\": %.4f}}\n",
      std::string(Name(options.kernels->isa)).c_str(), options.num_threads, rounds,
      static_cast<unsigned long long>(model.bytes_read()),
      static_cast<unsigned long long>(model.bytes_landed()), Median(times.plain),
      Median(times.transfer), Median(times.verify), Median(times.verified), best(times.plain),
      best(times.transfer), best(times.verify), best(times.verified));
  return 0;
}

}  // namespace
}  // namespace weightd

int main(int argc, char** argv) { return weightd::Main(argc, argv); }
