// The part of a rank's layout that one round of a sync writes; see daemon/layout/stages.h.
#pragma once

#include <cstdint>
#include <vector>

#include "daemon/layout/stages.h"

namespace weightd {

/// What one engine rank receives in one round.
struct RoundLayout {
  RankLayout layout;             ///< the round's parameters that are written, and their writes
  std::vector<uint32_t> params;  ///< where these are in the rank's own parameters
};

/// One layout per round, which together have every write once, in its order.
/// \pre CheckStages(layout.params).ok()
std::vector<RoundLayout> SplitRounds(const RankLayout& layout);

}  // namespace weightd
