// What every transport needs of a bound plan during one step: blocks with addresses, digest words,
// and errors that name what they are about.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/transport/block_item.h"
#include "daemon/transport/transport.h"

namespace weightd {

/// Source tensors that an engine rank reads, ascending.
std::vector<uint32_t> TensorsOf(const RankLayout& layout);

/// One Transfer, Verify or DigestShard in progress. Thread safety: const methods from any thread.
class StepBinder {
 public:
  /// \pre everything outlives this
  StepBinder(const BoundPlan& plan, RunControl& control, std::string_view phase)
      : plan_(plan), control_(control), phase_(phase) {}

  /// Chooses the engine rank and numbers its digest words.
  void SetTarget(size_t target);
  const BoundTarget& target() const { return *target_; }
  /// Its position in the plan.
  uint32_t target_number() const { return static_cast<uint32_t>(target_ - plan_.targets.data()); }

  /// Source tensors that the rank reads, ascending: word i belongs to tensors()[i].
  const std::vector<uint32_t>& tensors() const { return tensors_; }
  size_t num_words() const { return tensors_.size() + 1; }

  /// An error if the step must end now: cancelled, out of time, or memory that is gone. `tensor` is
  /// what would have come next.
  Status Check(const std::string& tensor) const;
  /// Adds phase and peer, and the tensor unless there is one.
  Status Fail(Status status, const std::string& tensor) const;
  Status NoMemory(const std::string& tensor, uint32_t rank) const;

  /// Name of the parameter that a write goes to; empty past the last write.
  std::string ParamAt(size_t write) const;
  /// Name of the first parameter of a window of the plan; empty past the last.
  std::string FirstParam(size_t window) const;
  void Report(uint32_t windows, uint64_t bytes, const std::string& next) const;

  /// Waits until writes [0, writes) have landed, as RunControl.landed says. Blocks. \error as Check
  Status AwaitLanded(size_t writes) const;

  const Box& Held(uint32_t rank, uint32_t tensor, uint32_t shard) const {
    const RankShards& shards = plan_.shards[rank];
    return shards.boxes[shards.box_index[shards.first[tensor] + shard]];
  }
  const Binding& Source(uint32_t rank, uint32_t tensor, uint32_t shard) const {
    return plan_.sources[rank][plan_.shards[rank].first[tensor] + shard];
  }

  /// A write narrowed to `target`, without its source. \error FAILED_PRECONDITION MEMORY_MOVED
  StatusOr<BlockItem> Bind(const Write& write, const Box& source, const Box& target) const;
  /// A whole write, for Verify.
  StatusOr<BlockItem> BindWrite(size_t write) const;
  /// A copy with its source, whose `from` stays empty if the shard is staged or there is nothing to
  /// read. \error as Bind
  StatusOr<BlockItem> BindCopy(const Copy& copy) const;

 private:
  const BoundPlan& plan_;
  RunControl& control_;
  const std::string phase_;
  const BoundTarget* target_ = nullptr;
  std::vector<uint32_t> tensors_;
};

}  // namespace weightd
