// Which version may come next for one model.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "daemon/base/status.h"

namespace weightd {

/// Versions are monotonic. A version is consumed once any replica has committed it; an attempt that
/// committed nowhere consumes nothing; a consumed version may be retried, with the same bytes, for
/// replicas that do not hold it yet. Thread safety: none; the owner locks.
class VersionLedger {
 public:
  /// A ledger that knows that `highest` has been consumed (0 = none); used after a restart.
  explicit VersionLedger(uint64_t highest = 0) : highest_(highest) {}

  /// May `version` be synced now? `replicas_behind`: some registered replica does not hold
  /// `version`. \error FAILED_PRECONDITION STALE_VERSION if it is 0 or below the highest consumed
  /// one \error ALREADY_EXISTS REUSED_VERSION if every replica holds it already
  Status Admit(uint64_t version, bool replicas_behind) const;

  /// Compares the digest of a retry with the one that was committed. `layout` tells engine layouts
  /// apart, whose digests are not comparable; an unknown pair passes. \error FAILED_PRECONDITION
  /// REUSED_VERSION if the bytes differ
  Status CheckRetry(uint64_t version, const std::string& layout, uint64_t digest) const;

  /// A replica with this layout has committed `version` from bytes with this digest.
  void Consume(uint64_t version, const std::string& layout, uint64_t digest);

  /// An engine reported that it holds `version` (after a restart of the daemon).
  void Observe(uint64_t version);

  uint64_t highest() const { return highest_; }

 private:
  uint64_t highest_;
  std::map<std::string, uint64_t> digests_;  // of highest_, per layout
};

}  // namespace weightd
