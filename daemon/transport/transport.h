// How bytes get from shards to parameters: one interface for shm, ipc, nccl and stream, with the
// same windows and the same failure semantics.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/base/status.h"
#include "daemon/layout/tensor_layout.h"
#include "daemon/plan/transfer_plan.h"

namespace weightd {

/// Memory of one shard or one parameter as this process sees it.
struct Binding {
  std::byte* base = nullptr;     ///< first element; nullptr when staged (or opaque, or aliased)
  Dims strides;                  ///< in elements, one per dimension
  bool staged = false;           ///< no mapped memory: read through StagedSource
  std::byte* segment = nullptr;  ///< the mapped range in which it lies
  uint64_t segment_bytes = 0;
};

/// One engine rank of a plan, bound to memory.
struct BoundTarget {
  const RankLayout* layout = nullptr;
  const RankPlan* plan = nullptr;
  std::vector<Binding> params;  ///< one per layout->params
  std::string label;            ///< for messages, e.g. "engine e0 tp 1"
  uint64_t registration = 0;    ///< never used again once params lie elsewhere
  bool remote = false;          ///< its memory belongs to another device than the worker's
  uint32_t round = 0;           ///< of the plan that layout and plan are of
};

/// A plan bound to this process's mappings.
/// Lifetime: everything pointed to outlives every call that takes the plan.
struct BoundPlan {
  const TensorTable* table = nullptr;
  std::span<const RankShards> shards;         ///< per actor rank
  std::vector<std::vector<Binding>> sources;  ///< [actor rank][position in its box_index]
  std::vector<BoundTarget> targets;
  uint64_t id = 0;                      ///< of the plan, never used again; 0: unknown
  std::vector<uint64_t> registrations;  ///< per actor rank, as BoundTarget::registration
};

/// Where staged shards come from (a client that copies into a ring).
class StagedSource {
 public:
  virtual ~StagedSource() = default;
  /// Largest part that one Fetch may ask for.
  virtual uint64_t max_part_bytes() const = 0;
  /// Blocks until `part` (relative to the origin of the box) of the shard is contiguous and
  /// row-major at the returned address, in the tensor's dtype; it stays there until the next Fetch
  /// from the same rank. Called by one thread. \error UNAVAILABLE PEER_LOST, DEADLINE_EXCEEDED
  /// DEADLINE, CANCELLED
  virtual StatusOr<const std::byte*> Fetch(uint32_t rank, uint32_t tensor, uint32_t shard,
                                           const Box& part) = 0;
};

/// Writes landed when the transfer is over.
inline constexpr uint32_t kAllLanded = UINT32_MAX;

/// What a running step obeys and reports to.
struct RunControl {
  const std::atomic<bool>* cancelled = nullptr;  ///< checked at every window
  Clock::time_point deadline = Clock::time_point::max();
  StagedSource* staged = nullptr;  ///< may be nullptr if nothing is staged
  /// Checked before every window and after the last: an error ends the step with it. The owner of
  /// the mappings puts Mapping::CheckIntact of all of them here. May be empty.
  std::function<Status()> check_memory;
  /// Called after each window: (windows done, bytes landed so far, first parameter of the next
  /// window).
  std::function<void(uint32_t, uint64_t, const std::string&)> on_window;
  /// Transfer: called when nothing of the first `writes` of an engine rank's writes is still to be
  /// written by this step: (target, writes). May be empty.
  std::function<void(uint32_t, uint32_t)> on_landed;
  /// Verify: how many of the engine rank's writes have landed; another thread raises it, up to
  /// kAllLanded, and nothing beyond is read. nullptr: all have.
  const std::atomic<uint32_t>* landed = nullptr;
  bool beside_wire = false;  ///< what lands comes over a wire, whose kernels need room meanwhile
};

/// Per window of a plan: the writes of which nothing is left to be written once it has landed.
std::vector<uint32_t> WritesLanded(const RankPlan& plan);

/// Digest words of one engine rank: words[i] belongs to source tensor tensors[i] (ascending); the
/// last word is the zero fill's.
struct RankDigests {
  std::vector<uint32_t> tensors;
  std::vector<uint64_t> words;
  bool operator==(const RankDigests&) const = default;
};

/// Thread safety: one call at a time per object.
class Transport {
 public:
  virtual ~Transport() = default;

  /// "shm", "ipc", "nccl" or "stream".
  virtual std::string_view name() const = 0;

  /// Copies every window of targets[target] and returns the digests of the sources as cast. Blocks.
  /// On an error some windows may have landed. \error CANCELLED CANCELLED, DEADLINE_EXCEEDED
  /// DEADLINE, UNAVAILABLE PEER_LOST
  virtual StatusOr<RankDigests> Transfer(const BoundPlan& plan, size_t target,
                                         RunControl& control) = 0;

  /// Transfer for several engine ranks; control.on_window counts over all of them. On an error some
  /// windows of any of them may have landed. This one transfers one rank after the other.
  virtual StatusOr<std::vector<RankDigests>> TransferAll(const BoundPlan& plan,
                                                         std::span<const uint32_t> targets,
                                                         RunControl& control);

  /// Digests the memory of targets[target], read anew. Blocks.
  virtual StatusOr<RankDigests> Verify(const BoundPlan& plan, size_t target,
                                       RunControl& control) = 0;

  /// Digest word of one shard in its own dtype, for check_replicas. Blocks.
  virtual StatusOr<uint64_t> DigestShard(const BoundPlan& plan, uint32_t rank, uint32_t tensor,
                                         uint32_t shard, RunControl& control) = 0;

  /// Catch-up: copies all raw and derived parameters of targets[target] from a peer's, one binding
  /// each, and compares what landed with its source. Blocks. \error as Transfer; DATA_LOSS
  /// VERIFY_MISMATCH naming the parameter; UNIMPLEMENTED if host_memory()
  virtual Status CopyParams(const BoundPlan& plan, size_t target, std::span<const Binding> from,
                            RunControl& control);
  /// True if the bound memory can be read and written by the host, which then does catch-up itself.
  virtual bool host_memory() const { return true; }

  /// True if no later call can succeed: the process must be replaced.
  virtual bool broken() const { return false; }
};

}  // namespace weightd
