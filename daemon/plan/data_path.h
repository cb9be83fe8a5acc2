// How bytes get from the memory of one device to that of another, and which worker moves them.
// Pure: names of devices in, a choice with its reason out.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/plan/plan_compiler.h"
#include "daemon/plan/wire_schedule.h"

namespace weightd {

/// The device of host memory that names no other. "host.1", "host.2" ... are host memory as well,
/// each with a worker of its own.
inline constexpr char kHostDevice[] = "host";

/// "host" or "host.N".
bool IsHostDevice(std::string_view device);
/// "GPU-" and a UUID, as nvidia-smi prints it. In builds with failpoints also "GPU-<uuid>.N":
/// another worker of the same GPU, so that a machine with one GPU can test what takes several.
bool IsGpuDevice(std::string_view device);
/// The GPU itself: "GPU-<uuid>" of "GPU-<uuid>.N".
std::string_view GpuOf(std::string_view device);
inline bool IsDevice(std::string_view device) {
  return IsHostDevice(device) || IsGpuDevice(device);
}

enum class Path {
  kShm,     ///< the source's worker stores into mapped host memory
  kIpc,     ///< the source's worker stores into mapped memory of its own or a peer GPU
  kNccl,    ///< the source's worker packs and sends, the destination's receives and scatters
  kSocket,  ///< the same between workers of host memory, over unix sockets
  kPull,    ///< one of the others into a stage, out of which the destination's client copies
};
std::string_view Name(Path path);
/// True if both devices' workers take part: packed, sent and scattered.
inline bool IsWire(Path path) { return path == Path::kNccl || path == Path::kSocket; }

/// One end of a transfer.
struct Place {
  std::string device;
  bool mappable = true;  ///< false: a worker cannot map this memory (sleep-mode allocators)
};

/// The paths beside shm and pull that this build has.
struct BuiltPaths {
  bool ipc = false;
  bool nccl = false;
};
BuiltPaths ThisBuild();

struct PathChoice {
  Path path = Path::kShm;
  std::string reason;  ///< for operators
};

/// What operator and hardware say.
struct PathPolicy {
  /// Between different devices never store directly: worker.path = "wire".
  bool always_wire = false;
  /// By GPU: those whose memory it can access, as its worker reported. One that is missing here can
  /// access all.
  std::map<std::string, std::set<std::string>> peers;
  bool operator==(const PathPolicy&) const = default;
};

/// The path of a target that cannot be mapped is kPull; its reason names the one into the stage,
/// which is what ChoosePath says for a target that can. \error FAILED_PRECONDITION NO_PATH naming
/// both devices if this build cannot serve the pair, or if the source cannot be mapped
StatusOr<PathChoice> ChoosePath(const Place& source, const Place& target,
                                const BuiltPaths& built = ThisBuild(),
                                const PathPolicy& policy = {});

/// OK if this build can run a worker for the device.
/// \error INVALID_ARGUMENT CONFIG naming the device
Status CheckServed(std::string_view device);

/// What one worker does in a sync of one replica. The worker of a source's device stores into the
/// engine's memory, or sends to the worker of the engine rank's device, which stores. Zero fill and
/// verification are done by the worker of the engine rank's own device.
struct WorkerShare {
  std::string device;
  std::vector<uint32_t> writes;    ///< engine ranks in whose transfer it takes part, ascending
  std::vector<uint32_t> stores;    ///< of these, into whose memory it stores: lent to this worker
  std::vector<uint32_t> verifies;  ///< engine ranks on its own device, ascending
};

/// The shares of all devices on which a rank has its memory, by name. Every engine rank is written
/// by at least one worker (its own, if it receives nothing) and verified by exactly one.
std::vector<WorkerShare> ShareWork(const CompiledPlan& plan,
                                   std::span<const std::string> source_devices,
                                   std::span<const std::string> target_devices,
                                   const WirePairs& wire_pairs = {});

/// The part of a rank's plan that one worker copies: what its own sources supply and, if
/// `zero_fill`, the zero fill. Windows keep their cuts; those without a copy are left out.
RankPlan OwnCopies(const RankPlan& plan, const RankLayout& layout,
                   const std::vector<bool>& own_sources, bool zero_fill);

}  // namespace weightd
