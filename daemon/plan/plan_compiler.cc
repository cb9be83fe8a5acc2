#include "daemon/plan/plan_compiler.h"

#include "daemon/plan/plan_digest.h"

namespace weightd {
namespace {

/// Compiles a plan rank by rank.
class Compiler {
 public:
  Compiler(const TensorTable& table, std::span<const RankShards> shards, SourceGrid grid,
           size_t num_ranks, const WindowLimits& limits)
      : table_(table),
        limits_(limits),
        use_(table.size()),
        hasher_(table, shards, num_ranks, limits),
        plan_{.grid = std::move(grid), .num_actors = shards.size()} {
    plan_.pairs.reserve(num_ranks * shards.size());
  }

  /// Proves and counts the next engine rank.
  Status Add(const RankLayout& layout) {
    WEIGHTD_RETURN_IF_ERROR(
        WithRank(CheckCoverage(table_, layout), fmt::format("engine rank {}", plan_.ranks.size())));
    use_.Add(layout);
    hasher_.Add(layout);
    Count(layout, EnumerateRank(table_, plan_.grid, layout, limits_));
    return absl::OkStatus();
  }

  StatusOr<CompiledPlan> Finish(std::span<const uint32_t> skipped) && {
    WEIGHTD_RETURN_IF_ERROR(use_.Check(table_, skipped));
    plan_.digest = hasher_.Finish();
    return std::move(plan_);
  }

 private:
  void Count(const RankLayout& layout, const RankPlan& rank_plan) {
    RankTraffic traffic;
    const size_t first_pair = plan_.pairs.size();
    plan_.pairs.resize(first_pair + plan_.num_actors);
    for (const Copy& copy : rank_plan.copies) {
      const Write& write = layout.writes[copy.write];
      const uint64_t bytes = static_cast<uint64_t>(copy.target.num_elements()) *
                             SizeBytes(layout.params[write.param].dtype);
      if (write.zero_fill) {
        traffic.zero_fill_bytes += bytes;
        continue;
      }
      PairTraffic& pair = plan_.pairs[first_pair + copy.source_rank];
      ++pair.boxes;
      pair.bytes += bytes;
      if (!layout.params[write.param].pulled) continue;
      ++pair.pulled_boxes;
      pair.pulled_bytes += bytes;
    }
    traffic.bytes = rank_plan.bytes;
    traffic.boxes = rank_plan.copies.size();
    traffic.windows = static_cast<uint32_t>(rank_plan.windows.size());
    plan_.ranks.push_back(traffic);
    plan_.bytes += traffic.bytes;
    plan_.boxes += traffic.boxes;
    plan_.windows += traffic.windows;
  }

  const TensorTable& table_;
  const WindowLimits& limits_;
  SourceUse use_;
  PlanHasher hasher_;
  CompiledPlan plan_;
};

}  // namespace

StatusOr<CompiledPlan> CompilePlan(const TensorTable& table, std::span<const RankShards> shards,
                                   const LayoutFn& layout_of, size_t num_ranks,
                                   std::span<const uint32_t> skipped, const WindowLimits& limits) {
  WEIGHTD_ASSIGN_OR_RETURN(SourceGrid grid, SourceGrid::Build(table, shards));
  Compiler compiler(table, shards, std::move(grid), num_ranks, limits);
  for (size_t rank = 0; rank < num_ranks; ++rank) {
    WEIGHTD_ASSIGN_OR_RETURN(const RankLayout layout, layout_of(rank));
    WEIGHTD_RETURN_IF_ERROR(compiler.Add(layout));
  }
  return std::move(compiler).Finish(skipped);
}

StatusOr<CompiledPlan> CompilePlan(const TensorTable& table, std::span<const RankShards> shards,
                                   std::span<const RankLayout* const> replica,
                                   std::span<const uint32_t> skipped, const WindowLimits& limits) {
  WEIGHTD_ASSIGN_OR_RETURN(SourceGrid grid, SourceGrid::Build(table, shards));
  Compiler compiler(table, shards, std::move(grid), replica.size(), limits);
  for (const RankLayout* layout : replica) WEIGHTD_RETURN_IF_ERROR(compiler.Add(*layout));
  return std::move(compiler).Finish(skipped);
}

}  // namespace weightd
