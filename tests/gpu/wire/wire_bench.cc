// The transfer of the nccl path alone, without daemon, verification and acknowledgement: trainer
// rank's memory on GPU 0, a TP 1 bfloat16 engine rank's on GPU 1, one process for each. Needs two
// GPUs, else exit status 77.
//
//   wire_bench MODEL SOURCE STAGING_MIB...     llama or moe; float32 or bfloat16
//
// A line of JSON per staging: median and least of ROUNDS wall times of the receiver, from a barrier
// to its digests, after one warm-up; bytes landed, GB = 1e9; what the first opening of a wire takes
// of each GPU beside the staging ("nccl_mib") and all that was taken once the rounds were over
// ("added_mib", without the memory of trainer and engine).
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "daemon/device/cuda/buffer.h"
#include "daemon/device/cuda/device.h"
#include "daemon/transport/nccl/gpu_stage.h"
#include "daemon/transport/nccl/nccl_wire.h"
#include "daemon/transport/wire/wire_transport.h"
#include "tests/gpu/wire/wire_model.h"

namespace weightd {
namespace {

constexpr int kSkipped = 77;
constexpr int kRounds = 9;

[[noreturn]] void Fail(const std::string& what) {
  std::fprintf(stderr, "wire_bench: %s\n", what.c_str());
  std::_Exit(1);
}

template <class T>
T Must(StatusOr<T> result) {
  if (!result.ok()) Fail(Message(result.status()));
  return *std::move(result);
}

void Must(const Status& status) {
  if (!status.ok()) Fail(Message(status));
}

/// The other process.
class Other {
 public:
  explicit Other(int fd) : fd_(fd) {}

  void Send(const void* data, size_t size) const {
    if (::write(fd_, data, size) != static_cast<ssize_t>(size)) Fail("the other process is gone");
  }
  void Receive(void* data, size_t size) const {
    if (::recv(fd_, data, size, MSG_WAITALL) != static_cast<ssize_t>(size)) {
      Fail("the other process is gone");
    }
  }
  /// Returns when both are here; the other's value.
  double Meet(double value = 0) const {
    Send(&value, sizeof(value));
    Receive(&value, sizeof(value));
    return value;
  }

 private:
  const int fd_;
};

class Rank {
 public:
  Rank(uint32_t rank, Other other, const WireModel& model)
      : rank_(rank), device_{static_cast<int>(rank)}, other_(other), model_(model) {
    const uint64_t bytes = rank == 0 ? model.source_bytes() : model.landed_bytes();
    memory_ = Must(cuda::DeviceBuffer::Create(device_, bytes));
    const cuda::Stream stream = Must(cuda::Stream::Create(device_));
    Must(memory_.Clear(stream.ref()));
    Must(stream.Synchronize());
    wires_.emplace(std::make_unique<NcclWireMaker>(Must(LoadNccl()), device_),
                   Must(GpuStage::Create(device_)));
    free_ = FreeMib();
  }

  void Run(const char* model, const char* source, int staging_mib) {
    const WireSchedule schedule =
        model_.Schedule(rank_ == 0 ? "0" : "1", uint64_t(staging_mib) << 20);
    std::string id = Must(wires_->MakeId());
    if (rank_ == 0) other_.Send(id.data(), id.size());
    if (rank_ == 1) other_.Receive(id.data(), id.size());
    const std::atomic<bool> cancelled{false};
    Must(wires_->Open({.wire = 1, .plan = 1, .id = id}, schedule, cancelled));
    if (nccl_mib_ == 0) nccl_mib_ = free_ - FreeMib() - double(wires_->staging_bytes()) / (1 << 20);
    const std::vector<double> seconds = Time(schedule);
    const double added = free_ - FreeMib();
    const double other_nccl = other_.Meet(nccl_mib_), other_added = other_.Meet(added);
    wires_->Close(1);
    if (rank_ == 0) return;
    std::printf(
        "RESULT {\"model\": \"%s\", \"source\": \"%s\", \"staging_mib\": %d, \"turns\": %u, "
        "\"bytes\": "
        "%llu, \"seconds\": %.6f, \"best\": %.6f, \"gb_per_s\": %.1f, \"nccl_mib\": [%.0f, %.0f], "
        "\"added_mib\": [%.0f, %.0f]}\n",
        model, source, staging_mib, schedule.num_turns,
        static_cast<unsigned long long>(model_.landed_bytes()), seconds[kRounds / 2], seconds[0],
        static_cast<double>(model_.landed_bytes()) / seconds[kRounds / 2] / 1e9, other_nccl,
        nccl_mib_, other_added, added);
    std::fflush(stdout);
  }

 private:
  /// Seconds of all rounds but the first, ascending.
  std::vector<double> Time(const WireSchedule& schedule) {
    const BoundPlan plan =
        model_.Bind(rank_ == 0 ? memory_.data() : nullptr, rank_ == 1 ? memory_.data() : nullptr);
    std::vector<double> seconds;
    for (int round = 0; round <= kRounds; ++round) {
      RunControl control;
      other_.Meet();
      const Clock::time_point begin = Clock::now();
      Must(wires_->Transfer(1, 1, plan, schedule, control, milliseconds(10'000)).status());
      if (round > 0) {
        seconds.push_back(std::chrono::duration<double>(Clock::now() - begin).count());
      }
    }
    std::sort(seconds.begin(), seconds.end());
    return seconds;
  }

  double FreeMib() const { return static_cast<double>(Must(cuda::FreeBytes(device_))) / (1 << 20); }

  const uint32_t rank_;
  const cuda::DeviceId device_;
  const Other other_;
  const WireModel& model_;
  cuda::DeviceBuffer memory_;
  std::optional<WireTransport> wires_;
  double free_ = 0;
  double nccl_mib_ = 0;
};

int Main(int argc, char** argv) {
  if (argc < 4) Fail("usage: wire_bench MODEL SOURCE STAGING_MIB...");
  SetNcclEnvironment();
  int fds[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM, 0, fds) != 0) Fail("no sockets");
  const pid_t child = ::fork();
  const uint32_t rank = child == 0 ? 1 : 0;
  ::close(fds[1 - rank]);  // its end is seen when the other process is gone
  const bool two = cuda::CheckAvailable().ok() && cuda::NumMultiprocessors(cuda::DeviceId{1}).ok();
  if (two) {
    const std::string_view source = argv[2];
    const WireModel model(argv[1], source == "float32" ? DType::kFloat32 : DType::kBFloat16);
    Rank own(rank, Other(fds[rank]), model);
    for (int i = 3; i < argc; ++i) own.Run(argv[1], argv[2], std::atoi(argv[i]));
  } else if (rank == 0) {
    std::printf("skipped: needs two GPUs\n");
  }
  if (rank == 1) return two ? 0 : kSkipped;
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

}  // namespace
}  // namespace weightd

int main(int argc, char** argv) { return weightd::Main(argc, argv); }
