// The digest by which daemon and workers agree on a plan, taken layout by layout.
#pragma once

#include <memory>
#include <span>

#include "daemon/plan/transfer_plan.h"

namespace weightd {

/// Computes PlanDigest without keeping the layouts.
class PlanHasher {
 public:
  /// \pre num_layouts calls of Add follow, in the plan's order of engine ranks
  PlanHasher(const TensorTable& table, std::span<const RankShards> shards, size_t num_layouts,
             const WindowLimits& limits);
  ~PlanHasher();
  PlanHasher(const PlanHasher&) = delete;
  PlanHasher& operator=(const PlanHasher&) = delete;

  void Add(const RankLayout& layout);
  Digest128 Finish();

 private:
  class State;
  std::unique_ptr<State> state_;
};

}  // namespace weightd
