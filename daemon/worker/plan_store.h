// The plans of a worker: pages from the daemon, assembled, checked and enumerated.
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/layout/tensor_layout.h"
#include "daemon/plan/data_path.h"
#include "daemon/plan/transfer_plan.h"
#include "daemon/plan/wire_schedule.h"
#include "weightd/v1/worker.pb.h"

namespace weightd {

/// Plans kept at a time; the one used longest ago makes room.
inline constexpr size_t kMaxPlans = 8;

/// A plan as the daemon described it, not yet proven.
struct PlanInput {
  TensorTable table;
  std::vector<uint64_t> sources;  ///< member per actor rank
  std::vector<RankShards> shards;
  std::vector<RankLayout> layouts;          ///< per engine rank
  std::vector<uint64_t> targets;            ///< member per engine rank
  std::vector<std::string> labels;          ///< per engine rank
  std::vector<std::string> source_devices;  ///< per actor rank
  std::vector<std::string> target_devices;  ///< per engine rank
  WindowLimits limits;
  WirePairs wire_pairs;     ///< whose bytes are sent, not stored directly
  uint64_t wire_bytes = 0;  ///< staging of one device for them
  std::string digest;       ///< as the daemon sees it
};

/// Collects the pages of one plan. Thread safety: none.
class PlanAssembler {
 public:
  /// Appends a page. \error INVALID_ARGUMENT PROTOCOL / SHAPE / DTYPE for anything malformed
  Status Add(const v1::PlanPage& page);
  /// Checks that nothing is missing and that all positions are inside what they point to.
  /// \pre the page with `last` was added. \error INVALID_ARGUMENT PROTOCOL
  StatusOr<PlanInput> Finish();

 private:
  Status AddShards(const v1::RankShardsPage& page);
  Status AddWrites(const v1::RankWritesPage& page);
  PlanInput input_;
};

/// What one engine rank receives in one round of a sync; see daemon/layout/stages.h.
struct RankRound {
  const RankLayout* layout = nullptr;  ///< of this round; the plan owns it
  std::vector<uint32_t> params;  ///< where its parameters are in the rank's own; empty: the same
  RankPlan plan;                 ///< what this worker stores directly
  uint64_t landed = 0;           ///< bytes of all workers
};

/// A proven plan with the copies that this worker makes. Immutable.
struct LoadedPlan {
  uint64_t id = 0;  ///< in this process, never used again
  PlanInput input;
  std::string device;              ///< of this worker
  std::vector<bool> own_sources;   ///< per actor rank: its memory is on this device
  std::optional<SourceGrid> grid;  ///< unset for a catch-up: its plan has parameters only
  std::vector<std::vector<RankRound>> ranks;  ///< per engine rank, per round
  std::deque<RankLayout> round_layouts;       ///< of ranks that have several rounds
  std::vector<bool> stores;  ///< per engine rank: this worker stores into its memory
  std::vector<WireSchedule>
      wires;  ///< per round: what it sends and receives; none at all = nothing
  Digest128 digest{};
  uint64_t bytes = 0;  ///< that one run of this worker lands, all engine ranks
  uint32_t windows = 0;
};

/// Proves coverage, enumerates the copies of the worker of `device` and compares the digest with
/// the daemon's. Slow for large models. A plan without tensors and actors serves catch-up only:
/// nothing is proven or enumerated. \error as SourceGrid::Build and CheckCoverage;
/// FAILED_PRECONDITION PLAN_MISMATCH
StatusOr<std::shared_ptr<const LoadedPlan>> LoadPlan(PlanInput input,
                                                     std::string device = kHostDevice);

/// Loaded plans by the daemon's handle. Thread safety: any thread.
class PlanStore {
 public:
  void Put(uint64_t handle, std::shared_ptr<const LoadedPlan> plan);
  void Drop(uint64_t handle);
  /// Marks the plan as used. \error FAILED_PRECONDITION NO_PLAN
  StatusOr<std::shared_ptr<const LoadedPlan>> Get(uint64_t handle);

 private:
  struct Entry {
    uint64_t handle = 0;
    std::shared_ptr<const LoadedPlan> plan;  ///< shared with the step that runs it
  };
  std::mutex mutex_;
  std::list<Entry> entries_;  ///< latest use first
};

}  // namespace weightd
