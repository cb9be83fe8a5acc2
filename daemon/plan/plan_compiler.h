// One call from layouts to a proven plan and the numbers that operators are shown.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "daemon/plan/transfer_plan.h"

namespace weightd {

/// What one engine rank receives.
struct RankTraffic {
  uint64_t bytes = 0;            ///< landed, zero fill included
  uint64_t zero_fill_bytes = 0;  ///< of these, not read from any actor
  uint64_t boxes = 0;            ///< copies
  uint32_t windows = 0;
};

/// What one actor rank sends to one engine rank.
struct PairTraffic {
  uint64_t boxes = 0;
  uint64_t bytes = 0;         ///< landed
  uint64_t pulled_boxes = 0;  ///< of these, to parameters that are pulled
  uint64_t pulled_bytes = 0;
};

/// A proven plan of one replica, without its copies: EnumerateRank gives them rank by rank.
struct CompiledPlan {
  SourceGrid grid;
  size_t num_actors = 0;
  std::vector<RankTraffic> ranks;  ///< per engine rank
  std::vector<PairTraffic> pairs;  ///< [engine rank * num_actors + actor rank]
  Digest128 digest{};              ///< PlanDigest
  uint64_t bytes = 0;              ///< sums over all engine ranks
  uint64_t boxes = 0;
  uint64_t windows = 0;

  const PairTraffic& pair(size_t actor, size_t engine_rank) const {
    return pairs[engine_rank * num_actors + actor];
  }
};

/// Gives the layout of one engine rank. Called once per rank, ascending; its errors are returned.
using LayoutFn = std::function<StatusOr<RankLayout>(size_t rank)>;

/// Proves that the trainer's shards tile every tensor, that every rank of the replica is written
/// exactly once and that every source element is read or skipped, and adds up the traffic. Holds
/// one layout and one rank's copies at a time. `skipped`: tensors that a rule skips, ascending.
/// \error as SourceGrid::Build, CheckCoverage (with the engine rank's position) and
///        SourceUse::Check
StatusOr<CompiledPlan> CompilePlan(const TensorTable& table, std::span<const RankShards> shards,
                                   const LayoutFn& layout_of, size_t num_ranks,
                                   std::span<const uint32_t> skipped, const WindowLimits& limits);

/// The same for layouts that the caller keeps.
StatusOr<CompiledPlan> CompilePlan(const TensorTable& table, std::span<const RankShards> shards,
                                   std::span<const RankLayout* const> replica,
                                   std::span<const uint32_t> skipped, const WindowLimits& limits);

}  // namespace weightd
