// The life of one replica (all ranks of one engine) as a table.
#pragma once

#include <string_view>

#include "daemon/base/status.h"

namespace weightd {

enum class ReplicaState {
  kRegistered = 1,  ///< holds no version that weightd vouches for; not ready
  kCatchingUp = 2,  ///< being filled from a peer or a retained copy; not ready
  kServing = 3,     ///< holds exactly its version; ready
  kStaging = 4,     ///< a sync may be writing its memory; not ready
  kCommitting = 5,  ///< verified, about to publish; not ready
  kPoisoned = 6,    ///< memory may be torn; not ready until a full sync heals it
  kGone = 7,        ///< a rank of it died, or not all ranks have come
};

enum class ReplicaEvent {
  kCompleteClean,    ///< all ranks present and all hold the same version, undisturbed
  kCompleteEmpty,    ///< all ranks present, at least one holds nothing or another version
  kCompleteDirty,    ///< all ranks present, at least one was left in an attempt
  kPrepare,          ///< a sync begins
  kCatchUp,          ///< a catch-up begins
  kVerified,         ///< all ranks verified
  kCommitted,        ///< all ranks published
  kFailedUntouched,  ///< the attempt ended before any byte was written
  kFailedTouched,    ///< the attempt ended after bytes may have been written
  kRankLost,         ///< a rank died or left
};

std::string_view Name(ReplicaState state);  ///< upper case, as users see it: "SERVING"
std::string_view Name(ReplicaEvent event);

/// The state after `event`. `before` is the state that held when the running attempt began;
/// kFailedUntouched returns to it. \error INTERNAL if the table has no such transition
StatusOr<ReplicaState> Next(ReplicaState state, ReplicaEvent event, ReplicaState before);

/// True only for kServing.
inline bool IsReady(ReplicaState state) { return state == ReplicaState::kServing; }

}  // namespace weightd
