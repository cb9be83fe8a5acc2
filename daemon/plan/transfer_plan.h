// (source shards, engine layouts) -> who copies what. Pure: no addresses, no I/O. The same code
// runs in the daemon (to prove and to show) and in the workers (to enumerate their own copies), so
// both compute the same plan and digest.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/layout/tensor_layout.h"

namespace weightd {

/// Limits of one window; equal on every participant.
struct WindowLimits {
  uint64_t bytes = 64u << 20;
  uint32_t operations = 1024;
};

/// One copy: the part of a write that one actor rank supplies.
struct Copy {
  uint32_t write = 0;        ///< position in RankLayout::writes
  uint32_t source_rank = 0;  ///< actor rank; meaningless for a zero fill
  uint32_t shard =
      0;       ///< which of the rank's boxes of that tensor (position in its range of box_index)
  Box source;  ///< global coordinates of the source tensor; the write's own box for a zero fill
  Box target;  ///< coordinates of the parameter
};

/// Copies [begin, end) of a RankPlan.
struct Window {
  uint32_t begin = 0;
  uint32_t end = 0;
  uint64_t bytes = 0;  ///< landed
};

/// The copies of one engine rank in (layer, parameter, offset) order, cut into windows.
/// *Layer* of a parameter = (prefix, outermost integer) of its name.
struct RankPlan {
  std::vector<Copy> copies;
  std::vector<Window> windows;
  uint64_t bytes = 0;  ///< landed, zero fill included
};

/// Who holds what, per tensor, as cuts and owners per dimension (a grid). Tensors that are cut
/// alike share one grid.
class SourceGrid {
 public:
  /// Proves that the boxes of each replica group tile every tensor exactly once and builds the
  /// grid. Cells that several ranks hold (replicas) are shared out so that no rank sends more than
  /// its part. Thread safety: immutable after Build. \pre every shards[r].first.size() ==
  /// table.size() + 1 \error INVALID_ARGUMENT GAP if elements of a tensor are held by no rank;
  /// names tensor and box \error INVALID_ARGUMENT OVERLAP if two boxes overlap without being
  /// replicas of each other; names tensor and ranks \error INVALID_ARGUMENT SHAPE if a box leaves
  /// its tensor
  static StatusOr<SourceGrid> Build(const TensorTable& table, std::span<const RankShards> shards);

  SourceGrid(SourceGrid&&) noexcept;
  SourceGrid& operator=(SourceGrid&&) noexcept;
  ~SourceGrid();

  /// Calls fn(cell, rank, shard) for every cell of `tensor` that meets `box`; cell is the common
  /// part.
  template <typename Fn>
  void ForEachOwner(uint32_t tensor, const Box& box, Fn&& fn) const;

  /// All ranks that hold exactly this cell as replicas of each other, for check_replicas: pairs of
  /// (tensor, ranks).
  struct ReplicatedShard {
    uint32_t tensor = 0;
    Box box;
    std::vector<uint32_t> ranks;
  };
  std::vector<ReplicatedShard> Replicated() const;

 private:
  struct Impl;
  explicit SourceGrid(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// Proves one engine rank's layout: every element of every raw or derived parameter is written
/// exactly once; source and target boxes lie inside their tensors; dtypes can be cast. \error
/// INVALID_ARGUMENT UNCOVERED_PARAMETER / OVERLAP / SHAPE / DTYPE, each naming the parameter
Status CheckCoverage(const TensorTable& table, const RankLayout& layout);

/// Proves that every element of every source tensor is used by some rank of the replica or belongs
/// to a tensor of `skipped` (ascending positions, skipped on purpose by a rule). \error
/// INVALID_ARGUMENT UNKNOWN_TENSOR naming the tensor and what is left over
Status CheckSourcesUsed(const TensorTable& table, std::span<const RankLayout* const> replica,
                        std::span<const uint32_t> skipped);

/// Enumerates the copies of one engine rank and cuts them into windows. Deterministic.
/// \pre CheckCoverage(table, layout).ok()
RankPlan EnumerateRank(const TensorTable& table, const SourceGrid& grid, const RankLayout& layout,
                       const WindowLimits& limits);

/// XXH3-128 of the whole input of a plan, canonical: table, shards, layouts, limits. Participants
/// compare it.
using Digest128 = std::array<uint8_t, 16>;
Digest128 PlanDigest(const TensorTable& table, std::span<const RankShards> shards,
                     std::span<const RankLayout* const> layouts, const WindowLimits& limits);

/// XXH3-128 of a tensor table, canonical.
Digest128 TableDigest(const TensorTable& table);

/// The layer a parameter belongs to, for ordering and for messages: ("model.layers.", 3) for
/// model.layers.3.mlp...; names without an integer get index -1.
struct LayerKey {
  std::string prefix;
  int64_t index = -1;
};
LayerKey LayerOf(const std::string& name);

}  // namespace weightd
