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

#include "absl/functional/function_ref.h"
#include "daemon/base/status.h"
#include "daemon/layout/tensor_layout.h"
#include "daemon/plan/copy_list.h"

namespace weightd {

/// Limits of one window; equal on every participant.
struct WindowLimits {
  uint64_t bytes = 64u << 20;  ///< landed; only a single element may exceed it
  uint32_t operations = 1024;  ///< copies
};

/// Copies [begin, end) of a RankPlan.
struct Window {
  uint32_t begin = 0;
  uint32_t end = 0;
  uint64_t bytes = 0;  ///< landed
};

/// The copies of one engine rank in (layer, parameter, target offset) order, cut into windows.
struct RankPlan {
  CopyList copies;
  std::vector<Window> windows;
  uint64_t bytes = 0;  ///< landed, zero fill included
};

/// A replicated box is cut into one stripe per owner when every stripe has at least this many
/// bytes; a smaller one is sent whole, by the owner that sends least so far.
inline constexpr uint64_t kMinStripeBytes = 64u << 10;

/// Who holds what, per tensor, as cuts and owners. Tensors of equal shape and dtype that are cut
/// alike share one tiling, so that the grid's size does not grow with the number of layers.
/// Thread safety: immutable after Build.
class SourceGrid {
 public:
  /// Proves that the boxes of each replica group tile every tensor exactly once and builds the
  /// grid. Equal boxes of different ranks are replicas; they are shared out so that the bytes that
  /// ranks send are even. Empty boxes hold nothing.
  /// \error INVALID_ARGUMENT GAP if elements of a tensor are held by no rank; names tensor and box
  /// \error INVALID_ARGUMENT OVERLAP if two boxes overlap without being replicas of each other;
  ///        names tensor, boxes and ranks
  /// \error INVALID_ARGUMENT SHAPE if a box does not fit its tensor; names tensor, box and rank
  /// \error INVALID_ARGUMENT TABLE_MISMATCH if a rank's lists do not belong to the table
  static StatusOr<SourceGrid> Build(const TensorTable& table, std::span<const RankShards> shards,
                                    uint64_t min_stripe_bytes = kMinStripeBytes);

  SourceGrid(SourceGrid&&) noexcept;
  SourceGrid& operator=(SourceGrid&&) noexcept;
  ~SourceGrid();

  /// Calls fn(cell, rank, shard) for disjoint cells that together are `box`, in a fixed order.
  /// `shard` is the position of the holding box in the rank's range of box_index.
  /// \pre box lies inside the tensor
  using OwnerFn = absl::FunctionRef<void(const Box& cell, uint32_t rank, uint32_t shard)>;
  void ForEachOwner(uint32_t tensor, const Box& box, OwnerFn fn) const;

  /// A box that several ranks hold, for check_replicas; shards[i] is its position in the range of
  /// ranks[i].
  struct ReplicatedShard {
    uint32_t tensor = 0;
    Box box;
    std::vector<uint32_t> ranks;
    std::vector<uint32_t> shards;
  };
  /// Calls fn for every replicated box, by ascending tensor.
  void ForEachReplicated(absl::FunctionRef<void(const ReplicatedShard&)> fn) const;
  /// The same as a list.
  std::vector<ReplicatedShard> Replicated() const;

  /// Distinct tilings that the tensors share.
  size_t num_tilings() const;

 private:
  struct Impl;
  explicit SourceGrid(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// Proves one engine rank's layout: every element of every raw or derived parameter is written
/// exactly once, aliased and opaque ones not at all; source and target boxes lie inside their
/// tensors and agree; dtypes can be cast.
/// \error INVALID_ARGUMENT UNCOVERED_PARAMETER / OVERLAP / SHAPE / DTYPE / UNKNOWN_TENSOR, each
///        naming the parameter
Status CheckCoverage(const TensorTable& table, const RankLayout& layout);

/// Proves that every element of every source tensor is read by some rank of a replica, layout by
/// layout, without keeping the layouts.
class SourceUse {
 public:
  explicit SourceUse(size_t num_tensors) : read_(num_tensors) {}

  /// \pre CheckCoverage(table, layout).ok()
  void Add(const RankLayout& layout);

  /// `skipped`: tensors that a rule skips on purpose, ascending positions.
  /// \error INVALID_ARGUMENT UNKNOWN_TENSOR naming the tensor and what is left over
  Status Check(const TensorTable& table, std::span<const uint32_t> skipped) const;

 private:
  std::vector<std::vector<Box>> read_;  ///< per tensor a union of boxes
};

/// SourceUse for the kept layouts of one whole replica.
Status CheckSourcesUsed(const TensorTable& table, std::span<const RankLayout* const> replica,
                        std::span<const uint32_t> skipped);

/// Enumerates the copies of one engine rank and cuts them into windows. A copy of more bytes than a
/// window may have is split. Deterministic. \pre CheckCoverage(table, layout).ok()
RankPlan EnumerateRank(const TensorTable& table, const SourceGrid& grid, const RankLayout& layout,
                       const WindowLimits& limits);

/// XXH3-128, big endian, of the whole input of a plan, canonical: table, shards, layouts, limits.
/// Participants compare it.
using Digest128 = std::array<uint8_t, 16>;
Digest128 PlanDigest(const TensorTable& table, std::span<const RankShards> shards,
                     std::span<const RankLayout* const> layouts, const WindowLimits& limits);

/// CanonicalTableDigest of daemon/layout/table_digest.h, under the plan's type.
Digest128 TableDigest(const TensorTable& table);

/// The layer a parameter belongs to, for ordering and for messages: ("model.layers.", 3) for
/// model.layers.3.mlp.up_proj.weight. A name without an integer component is its own prefix, with
/// index -1.
struct LayerKey {
  std::string prefix;
  int64_t index = -1;
  bool operator==(const LayerKey&) const = default;
};
LayerKey LayerOf(const std::string& name);

/// Positions of the parameters in layer order: the layers of one prefix follow each other by index,
/// from where the first of them stands; a name without an index keeps its place between them.
std::vector<uint32_t> LayerOrder(std::span<const ParamInfo> params);

}  // namespace weightd
