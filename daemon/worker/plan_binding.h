// A plan and the memory that its members lend now, joined into what a transport runs.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/base/status.h"
#include "daemon/transport/transport.h"
#include "daemon/worker/member_table.h"
#include "daemon/worker/plan_store.h"

namespace weightd {

/// Binds every shard of every actor rank on this worker's device; the others stay empty.
/// \pre these sources of the plan are pinned
/// \error FAILED_PRECONDITION MEMORY_MOVED / SHAPE / DTYPE naming tensor, rank and remedy if what a
/// rank lends is not what the plan expects; UNAVAILABLE MEMORY_MOVED if it was truncated
Status BindSources(const LoadedPlan& plan, const PinnedMembers& pinned, BoundPlan* bound);

/// Binds what one engine rank receives in a round as bound->targets[target]; the other targets stay
/// empty. \pre the rank's member is pinned; it has that round. \error as BindSources
Status BindEngineRank(const LoadedPlan& plan, uint32_t target, uint32_t round,
                      const PinnedMembers& pinned, BoundPlan* bound);

/// An engine rank in a round without its memory, as far as sending to it needs.
void DescribeEngineRank(const LoadedPlan& plan, uint32_t target, uint32_t round, BoundPlan* bound);

/// The memory of all parameters of `layout` as a member lends it, e.g. a serving peer. `positions`:
/// where they are in the member's own parameters; empty: the same. \error as BindSources
StatusOr<std::vector<Binding>> BindParams(const RankLayout& layout,
                                          std::span<const uint32_t> positions,
                                          const std::string& label, const MemberMemory& memory);

/// OK while nothing that is pinned was truncated. Before a step sizes are compared where that is
/// cheap beside copying the memory; elsewhere, and after a step, what was touched is what counts.
/// \error UNAVAILABLE MEMORY_MOVED naming the rank
Status CheckIntactBefore(const PinnedMembers& pinned, std::span<const uint64_t> members);
Status CheckIntactAfter(const PinnedMembers& pinned, std::span<const uint64_t> members);

/// Fetches staged shards through the rings of their members.
class RingSource final : public StagedSource {
 public:
  /// \pre everything outlives this
  RingSource(const LoadedPlan& plan, const PinnedMembers& pinned, const v1::AttemptId& attempt,
             const std::atomic<bool>* cancelled, Clock::time_point deadline)
      : plan_(plan),
        pinned_(pinned),
        attempt_(attempt),
        cancelled_(cancelled),
        deadline_(deadline) {}

  uint64_t max_part_bytes() const override { return kRingBytes; }
  StatusOr<const std::byte*> Fetch(uint32_t rank, uint32_t tensor, uint32_t shard,
                                   const Box& part) override;

 private:
  const LoadedPlan& plan_;
  const PinnedMembers& pinned_;
  const v1::AttemptId attempt_;
  const std::atomic<bool>* cancelled_;
  const Clock::time_point deadline_;
};

}  // namespace weightd
