// The copies of a wire's schedule bound to addresses: shard to ring, ring to parameter.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/transport/block_item.h"
#include "daemon/transport/step_binder.h"
#include "daemon/transport/wire/wire.h"

namespace weightd {

/// Thread safety: const methods from any thread.
class WireBinder {
 public:
  /// \pre everything outlives this; plan.layouts are set for all engine ranks
  WireBinder(const BoundPlan& plan, const WireSchedule& schedule, std::byte* ring);

  /// Copy `i` of schedule.sends, of `turn`: to.base lies in the ring, `word` among num_words().
  /// \error FAILED_PRECONDITION MEMORY_MOVED if the shard has no memory or is staged
  StatusOr<BlockItem> BindPack(uint32_t i, uint32_t turn) const;
  /// Copy `i` of schedule.receives, of `turn`: from.base lies in the ring.
  /// \error FAILED_PRECONDITION MEMORY_MOVED
  StatusOr<BlockItem> BindScatter(uint32_t i, uint32_t turn) const;

  /// Digest words of all engine ranks to which this device sends, one after the other.
  size_t num_words() const { return num_words_; }
  /// The words as each engine rank's digests, by engine rank.
  std::vector<std::pair<uint32_t, RankDigests>> Split(const std::vector<uint64_t>& words) const;

  /// The parameter with which a turn begins on this device; empty past the last.
  std::string NameAt(uint32_t turn) const;

 private:
  struct Words {
    std::vector<uint32_t> tensors;  ///< that the rank reads, ascending
    size_t first = 0;
  };
  const std::string& ParamName(uint32_t target, const Write& write) const;

  const BoundPlan& plan_;
  const WireSchedule& schedule_;
  std::byte* const ring_;
  std::map<uint32_t, Words> words_;  ///< by engine rank
  size_t num_words_ = 0;
};

}  // namespace weightd
