#include "daemon/plan/data_path.h"

#include <algorithm>
#include <map>

namespace weightd {
namespace {

bool IsNumber(std::string_view text) {
  return !text.empty() && text.size() <= 4 &&
         std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

Status NoPath(const Place& source, const Place& target, std::string_view why,
              std::string_view remedy) {
  return Error(StatusCode::kFailedPrecondition, reason::kNoPath, remedy,
               "no data path from {} to {}: {}", source.device, target.device, why);
}

}  // namespace

bool IsHostDevice(std::string_view device) {
  constexpr std::string_view kPrefix = "host.";
  return device == kHostDevice ||
         (device.starts_with(kPrefix) && IsNumber(device.substr(kPrefix.size())));
}

bool IsGpuDevice(std::string_view device) {
  constexpr std::string_view kPrefix = "GPU-";
  constexpr size_t kUuid = 36;
#ifdef WEIGHTD_FAILPOINTS
  const std::string_view name = GpuOf(device);
  if (name != device && !IsNumber(device.substr(name.size() + 1))) return false;
  device = name;
#endif
  return device.size() == kPrefix.size() + kUuid && device.starts_with(kPrefix) &&
         device.find_first_not_of("0123456789abcdef-", kPrefix.size()) == std::string_view::npos;
}

std::string_view GpuOf(std::string_view device) { return device.substr(0, device.find('.')); }

std::string_view Name(Path path) {
  switch (path) {
    case Path::kShm:
      return "shm";
    case Path::kIpc:
      return "ipc";
    case Path::kNccl:
      return "nccl";
    case Path::kSocket:
      return "socket";
    case Path::kPull:
      return "pull";
  }
  return "";
}

BuiltPaths ThisBuild() {
  BuiltPaths built;
#if WEIGHTD_HAS_CUDA
  built.ipc = true;
#endif
#if WEIGHTD_HAS_NCCL
  built.nccl = true;
#endif
  return built;
}

namespace {

constexpr char kAlwaysWire[] = "worker.path is \"wire\"";
constexpr char kBuildRemedy[] = "use a build of weightd that has the path";
constexpr char kLendableRemedy[] = "keep the trainer's tensors in memory that can be lent";

bool CanAccess(const PathPolicy& policy, const Place& source, const Place& target) {
  const auto peers = policy.peers.find(std::string(GpuOf(source.device)));
  return peers == policy.peers.end() || GpuOf(source.device) == GpuOf(target.device) ||
         peers->second.contains(std::string(GpuOf(target.device)));
}

StatusOr<PathChoice> ChooseForGpus(const Place& source, const Place& target,
                                   const BuiltPaths& built, const PathPolicy& policy) {
  const bool same = source.device == target.device;
  const bool access = CanAccess(policy, source, target);
  if (built.ipc && (same || (access && !policy.always_wire))) {
    return PathChoice{Path::kIpc, same ? "same GPU" : "peer GPUs of this host"};
  }
  const char* const why = policy.always_wire ? kAlwaysWire
                          : access           ? "GPUs without mapped peer memory"
                                             : "these GPUs cannot access each other's memory";
  if (built.nccl) return PathChoice{Path::kNccl, why};
  if (built.ipc) return NoPath(source, target, why, "use a build of weightd that has NCCL");
  return NoPath(source, target, "this build moves host memory only", kBuildRemedy);
}

}  // namespace

StatusOr<PathChoice> ChoosePath(const Place& source, const Place& target, const BuiltPaths& built,
                                const PathPolicy& policy) {
  if (!source.mappable) {
    return NoPath(source, target, "memory of the source cannot be mapped", kLendableRemedy);
  }
  if (!target.mappable) {
    WEIGHTD_ASSIGN_OR_RETURN(const PathChoice staged,
                             ChoosePath(source, Place{target.device}, built, policy));
    return PathChoice{Path::kPull, fmt::format("memory cannot be mapped: staged by {}, {}",
                                               Name(staged.path), staged.reason)};
  }
  if (IsHostDevice(source.device) && IsHostDevice(target.device)) {
    if (policy.always_wire && source.device != target.device) {
      return PathChoice{Path::kSocket, kAlwaysWire};
    }
    return PathChoice{Path::kShm, "both in host memory of this host"};
  }
  if (!IsGpuDevice(source.device) || !IsGpuDevice(target.device)) {
    return NoPath(source, target, "one is host memory, the other a GPU's",
                  "keep the weights of trainer and engine in memory of one kind");
  }
  return ChooseForGpus(source, target, built, policy);
}

Status CheckServed(std::string_view device) {
  const Place place{std::string(device)};
  Status status = ChoosePath(place, place).status();
  if (status.ok()) return status;
  return Error(StatusCode::kInvalidArgument, reason::kConfig,
               "use a build of weightd for GPUs, or leave the device out of worker.devices",
               "this build cannot run a worker for the device: {}", device);
}

std::vector<WorkerShare> ShareWork(const CompiledPlan& plan,
                                   std::span<const std::string> source_devices,
                                   std::span<const std::string> target_devices,
                                   const WirePairs& wire_pairs) {
  std::map<std::string, WorkerShare> shares;
  for (const std::string& device : source_devices) shares[device];
  for (const std::string& device : target_devices) shares[device];
  for (uint32_t target = 0; target < target_devices.size(); ++target) {
    const std::string& own = target_devices[target];
    shares[own].verifies.push_back(target);
    std::map<std::string, bool> stores;  // false: only sends
    for (size_t actor = 0; actor < source_devices.size(); ++actor) {
      if (plan.pair(actor, target).boxes == 0) continue;
      const bool wire = wire_pairs.contains({source_devices[actor], own});
      stores.try_emplace(source_devices[actor], !wire);
      if (wire) stores[own] = true;  // it receives
    }
    if (plan.ranks[target].zero_fill_bytes > 0 || stores.empty()) stores[own] = true;
    for (const auto& [device, yes] : stores) {
      shares[device].writes.push_back(target);
      if (yes) shares[device].stores.push_back(target);
    }
  }
  std::vector<WorkerShare> list;
  for (auto& [device, share] : shares) {
    share.device = device;
    list.push_back(std::move(share));
  }
  return list;
}

RankPlan OwnCopies(const RankPlan& plan, const RankLayout& layout,
                   const std::vector<bool>& own_sources, bool zero_fill) {
  RankPlan own;
  for (const Window& window : plan.windows) {
    Window kept{static_cast<uint32_t>(own.copies.size()), 0, 0};
    for (uint32_t i = window.begin; i < window.end; ++i) {
      const Copy copy = plan.copies[i];
      const Write& write = layout.writes[copy.write];
      if (write.zero_fill ? !zero_fill : !own_sources[copy.source_rank]) continue;
      own.copies.push_back(copy);
      kept.bytes += plan.copies.TargetElements(i) * SizeBytes(layout.params[write.param].dtype);
    }
    kept.end = static_cast<uint32_t>(own.copies.size());
    own.bytes += kept.bytes;
    if (kept.end > kept.begin) own.windows.push_back(kept);
  }
  return own;
}

}  // namespace weightd
