// Plans by (trainer group, engine replica): evaluated and compiled once, replayed at every sync.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "daemon/sync/participants.h"

namespace weightd {

/// Equal for replicas whose ranks hold equal parameters at equal coordinates.
std::string LayoutKey(const ReplicaView& replica);

/// Thread safety: every method from any thread; compiling blocks other callers of the same cache.
class PlanCache {
 public:
  /// `on_compiled` is told how many seconds a compilation took.
  PlanCache(std::shared_ptr<const LoaderRegistry> loaders, WindowLimits limits, uint64_t wire_bytes,
            std::function<void(double)> on_compiled)
      : loaders_(std::move(loaders)),
        limits_(limits),
        wire_bytes_(wire_bytes),
        on_compiled_(std::move(on_compiled)) {}

  /// How paths are chosen. Plans that were made under another policy are made again.
  void SetPolicy(const PathPolicy& policy);

  /// Finds and evaluates the loader for every rank of `replica`, or binds the traces of its ranks.
  /// \error NOT_FOUND UNKNOWN_ARCHITECTURE / UNKNOWN_PROFILE, INVALID_ARGUMENT from the loader or
  /// the coverage proof
  StatusOr<std::shared_ptr<const ResolvedReplica>> Resolve(const GroupView& group,
                                                           const ReplicaView& replica);

  /// \pre Resolve(group, replica).ok()
  /// \error INVALID_ARGUMENT from the planner; FAILED_PRECONDITION NO_PATH if some of the bytes
  /// have no way from their source's device to the engine's
  StatusOr<std::shared_ptr<const ReplicaPlan>> Plan(const GroupView& group,
                                                    const ReplicaView& replica);

  /// Only what is cached: nullptr if this pair has not been planned.
  std::shared_ptr<const ReplicaPlan> Find(const GroupView& group, const ReplicaView& replica) const;

  /// Whether the current worker of this device holds the plan.
  bool Loaded(uint64_t handle, const std::string& device) const;
  void MarkLoaded(uint64_t handle, const std::string& device);
  /// A new worker holds nothing, and the wires of its predecessor are dead.
  void ForgetLoaded(const std::string& device);

  /// The open wire of a plan; 0: none.
  uint64_t FindWire(uint64_t handle) const;
  void KeepWire(uint64_t handle, uint64_t wire, const std::vector<std::string>& devices);
  void DropWire(uint64_t handle);
  /// An open wire, and the devices that it joins.
  struct OpenWire {
    uint64_t wire = 0;
    std::vector<std::string> devices;
  };
  /// Drops the wires of all plans in which the member takes part, for the workers to close.
  std::vector<OpenWire> DropWiresOf(MemberId member);

  /// Drops entries of other generations of this group and of replicas that `alive` does not know.
  /// Returns the handles of the plans dropped, for the workers.
  std::vector<uint64_t> Trim(const GroupView& group, const std::vector<ReplicaView>& alive);

  /// Handles are unique in this process.
  static uint64_t NextHandle();

 private:
  struct Entry {
    std::shared_ptr<const ResolvedReplica> resolved;
    std::shared_ptr<const ReplicaPlan> plan;
  };
  static std::string Key(const GroupView& group, const ReplicaView& replica);
  StatusOr<std::shared_ptr<const ReplicaPlan>> Compile(
      const GroupView& group, const ReplicaView& replica,
      std::shared_ptr<const ResolvedReplica> resolved);

  const std::shared_ptr<const LoaderRegistry> loaders_;
  const WindowLimits limits_;
  const uint64_t wire_bytes_;
  const std::function<void(double)> on_compiled_;

  mutable std::mutex mu_;
  std::map<std::string, Entry> entries_;
  std::set<std::pair<uint64_t, std::string>> loaded_;  // (handle, device)
  std::map<uint64_t, OpenWire> wires_;                 // by handle
  PathPolicy policy_;
};

}  // namespace weightd
