// Benchmark P11: the box kernels alone, in the memory of one GPU, beside the plainest kernels over
// one contiguous buffer of the same bytes. Floor and kernel run in turns; times are medians of
// device time between two events, after two rounds that are left out.
//
//   box_bench [--rounds N] [--case NAME] [--blocks N] [--fraction PERCENT]
//
// One line of JSON per figure. Bytes: "landed" is what is written to parameters (elements times the
// target's size); a digest's "read" is the same bytes, read once. GB = 1e9.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "daemon/device/cuda/box_kernels.h"
#include "daemon/device/cuda/buffer.h"
#include "daemon/device/cuda/cuda_status.h"
#include "daemon/device/cuda/device.h"
#include "daemon/device/cuda/event.h"
#include "daemon/device/cuda/stream.h"
#include "tests/gpu/bench_model.h"
#include "tests/gpu/floor_kernels.h"

namespace weightd::cuda {
namespace {

constexpr DeviceId kDevice{0};
constexpr int kSkipped = 77;

template <class T>
T Must(StatusOr<T> result) {
  if (result.ok()) return *std::move(result);
  std::fprintf(stderr, "box_bench: %s\n", Message(result.status()).c_str());
  std::exit(1);
}

void Must(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "box_bench: %s\n", Message(status).c_str());
  std::exit(1);
}

void MustCuda(int error) { Must(FromCuda(error, "a floor kernel failed")); }

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

class Bench {
 public:
  Bench(int rounds, int blocks) : rounds_(rounds), blocks_(blocks) {
    stream_ = Must(Stream::Create(kDevice));
    begin_ = Must(Event::Create(kDevice, Event::Kind::kTiming));
    end_ = Must(Event::Create(kDevice, Event::Kind::kTiming));
  }

  double Time(const std::function<void()>& enqueue) {
    Must(begin_.Record(stream_.ref()));
    enqueue();
    Must(end_.Record(stream_.ref()));
    Must(stream_.Synchronize());
    return Must(end_.SecondsSince(begin_));
  }

  // The fastest shape of a floor kernel, by three rounds of each.
  floors::Shape BestShape(const std::function<void(const floors::Shape&)>& run) {
    floors::Shape best;
    double best_seconds = 1e9;
    for (const int vectors : {1, 2, 4}) {
      for (const int blocks : {0, 2, 4, 8}) {
        for (const bool streaming : {false, true}) {
          const floors::Shape shape{vectors, blocks, streaming};
          std::vector<double> seconds;
          for (int i = 0; i < 3; ++i) seconds.push_back(Time([&] { run(shape); }));
          if (Median(seconds) >= best_seconds) continue;
          best_seconds = Median(seconds);
          best = shape;
        }
      }
    }
    return best;
  }

  // Floor and table in turns.
  void Compare(const std::string& name, const BenchModel& model, const BoxTable& table,
               DigestWords& words, const std::function<void()>& floor, const floors::Shape& shape) {
    std::vector<double> floor_seconds, seconds;
    for (int i = -2; i < rounds_; ++i) {
      const double a = Time(floor);
      Must(words.Clear(stream_.ref()));
      const double b =
          Time([&] { Must(Launch(table, 0, table.num_windows(), words, blocks_, stream_.ref())); });
      if (i < 0) continue;
      floor_seconds.push_back(a);
      seconds.push_back(b);
    }
    const double floor_median = Median(floor_seconds), median = Median(seconds);
    const auto bytes = static_cast<double>(model.landed_bytes());
    std::printf(
        R"({"case": "%s", "bytes": %.0f, "boxes": %zu, "table_bytes": %llu, "floor_ms": %.3f, )"
        R"("ms": %.3f, "best_ms": %.3f, "floor_gb_per_s": %.0f, "gb_per_s": %.0f, "ratio": %.3f, )"
        R"("floor_shape": "%d vectors, %d blocks, %s"})"
        "\n",
        name.c_str(), bytes, model.num_boxes(), static_cast<unsigned long long>(table.size_bytes()),
        floor_median * 1e3, median * 1e3, *std::min_element(seconds.begin(), seconds.end()) * 1e3,
        bytes / floor_median / 1e9, bytes / median / 1e9, median / floor_median, shape.vectors,
        shape.blocks_per_sm, shape.streaming ? "streaming" : "plain");
    std::fflush(stdout);
  }

  const Stream& stream() const { return stream_; }

 private:
  const int rounds_;
  const int blocks_;
  Stream stream_;
  Event begin_, end_;
};

BoxTable MakeTable(Bench& bench, const BoxImage& image, const DeviceBuffer& source,
                   const DeviceBuffer& target) {
  BoxTable table = Must(BoxTable::Create(image, kDevice, bench.stream().ref()));
  std::byte* const bases[] = {source.data(), target.data()};
  Must(table.SetBases(bases, bench.stream().ref()));
  return table;
}

std::vector<uint64_t> Words(Bench& bench, DigestWords& words) {
  Must(words.Fetch(bench.stream().ref()));
  Must(bench.stream().Synchronize());
  const auto read = Must(words.Read());
  return {read.begin(), read.end()};
}

// Copies with and without the source digest, then digests what landed; the words must agree.
void RunModel(Bench& bench, const std::string& name, const BenchModel& model,
              const BenchOptions& options) {
  const StreamRef stream = bench.stream().ref();
  const uint64_t landed = model.landed_bytes() / (64 << 10) * (64 << 10);
  const uint64_t elements = landed / SizeBytes(options.to);
  const bool cast = options.from != options.to;
  DeviceBuffer source = Must(DeviceBuffer::Create(
      kDevice, std::max(model.source_bytes(), elements * SizeBytes(options.from))));
  DeviceBuffer target = Must(DeviceBuffer::Create(kDevice, std::max(model.target_bytes(), landed)));
  MustCuda(
      floors::Fill(source.data(), source.size_bytes(), options.from == DType::kFloat32, stream));
  MustCuda(floors::Fill(target.data(), target.size_bytes(), false, stream));
  const auto floor = [&](const floors::Shape& shape) {
    MustCuda(cast ? floors::Cast(source.data(), target.data(), elements, shape, stream)
                  : floors::Copy(source.data(), target.data(), landed, shape, stream));
  };
  const floors::Shape shape = bench.BestShape(floor);
  std::vector<uint64_t> sent;
  for (const bool digest : {false, true}) {
    const BoxTable table = MakeTable(bench, model.CopyImage(digest), source, target);
    DigestWords words = Must(DigestWords::Create(kDevice, table.num_words()));
    bench.Compare(
        name + (digest ? ", copy and digest" : ", copy"), model, table, words,
        [&] { floor(shape); }, shape);
    if (digest) sent = Words(bench, words);
  }
  const BoxTable table = MakeTable(bench, model.DigestImage(), source, target);
  DigestWords words = Must(DigestWords::Create(kDevice, table.num_words()));
  DeviceBuffer sink = Must(DeviceBuffer::Create(kDevice, 256));
  const auto read = [&](const floors::Shape& read_shape) {
    MustCuda(floors::Read(target.data(), landed, sink.data(), read_shape, stream));
  };
  const floors::Shape read_shape = bench.BestShape(read);
  bench.Compare(
      name + ", digest in place", model, table, words, [&] { read(read_shape); }, read_shape);
  if (Words(bench, words) != sent) {
    std::fprintf(stderr, "box_bench: %s: the digests of what was sent and landed differ\n",
                 name.c_str());
    std::exit(1);
  }
}

struct Case {
  const char* name;
  BenchOptions options;
  void (*build)(BenchModel&);
};

constexpr DType kFloat32 = DType::kFloat32, kBFloat16 = DType::kBFloat16;
void Llama(BenchModel& model) { model.AddLlama8B(); }
void Moe(BenchModel& model) { model.AddQwen3Moe(); }
void Transposed(BenchModel& model) { model.AddTransposed(64); }

const Case kCases[] = {
    {"Llama-3.1-8B fp32 to bf16", {kFloat32, kBFloat16, 1, 1, 32}, Llama},
    {"Llama-3.1-8B fp32 to bf16, 4 actors", {kFloat32, kBFloat16, 4, 1, 32}, Llama},
    {"Llama-3.1-8B fp32 to bf16, 4 actors, TP 2", {kFloat32, kBFloat16, 4, 2, 32}, Llama},
    {"Llama-3.1-8B bf16 to bf16", {kBFloat16, kBFloat16, 1, 1, 32}, Llama},
    {"Qwen3-30B-A3B fp32 to bf16", {kFloat32, kBFloat16, 1, 1, 48}, Moe},
    {"Qwen3-30B-A3B bf16 to bf16", {kBFloat16, kBFloat16, 1, 1, 48}, Moe},
    {"Qwen3-30B-A3B fp32 to bf16, TP 4", {kFloat32, kBFloat16, 1, 4, 48}, Moe},
    {"transposed 4096x4096 fp32 to bf16", {kFloat32, kBFloat16, 1, 1, 1}, Transposed},
    {"transposed 4096x4096 bf16 to bf16", {kBFloat16, kBFloat16, 1, 1, 1}, Transposed}};

// The case with as many layers as `free_bytes` hold.
void RunCase(Bench& bench, const Case& wanted, uint64_t free_bytes) {
  BenchOptions options = wanted.options;
  for (; options.layers > 0; --options.layers) {
    BenchModel model(options);
    wanted.build(model);
    if (model.source_bytes() + model.target_bytes() > free_bytes) continue;
    std::string name = wanted.name;
    if (options.layers < wanted.options.layers) {
      name += ", " + std::to_string(options.layers) + " layers";
    }
    RunModel(bench, name, model, options);
    return;
  }
}

int Main(int argc, char** argv) {
  int rounds = 9, blocks = 0;
  double fraction = 90;
  std::string only;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string_view flag = argv[i];
    if (flag == "--rounds") rounds = std::atoi(argv[i + 1]);
    if (flag == "--blocks") blocks = std::atoi(argv[i + 1]);
    if (flag == "--fraction") fraction = std::atof(argv[i + 1]);
    if (flag == "--case") only = argv[i + 1];
  }
  if (const Status usable = CheckAvailable(); !usable.ok()) {
    std::printf("skipped: %s\n", Message(usable).c_str());
    return kSkipped;
  }
  const uint64_t free_bytes = Must(FreeBytes(kDevice));
  std::printf(R"({"device": "%s", "free_bytes": %llu, "rounds": %d, "blocks": %d})"
              "\n",
              Must(DeviceName(kDevice)).c_str(), static_cast<unsigned long long>(free_bytes),
              rounds, blocks);
  Bench bench(rounds, blocks);
  for (const Case& wanted : kCases) {
    if (!only.empty() && std::string_view(wanted.name).find(only) == std::string_view::npos) {
      continue;
    }
    RunCase(bench, wanted, static_cast<uint64_t>(static_cast<double>(free_bytes) * fraction / 100));
  }
  return 0;
}

}  // namespace
}  // namespace weightd::cuda

int main(int argc, char** argv) { return weightd::cuda::Main(argc, argv); }
