// What a test build breaks on purpose in this transport: see Mutated in daemon/base/failpoint.h.
#pragma once

#include <vector>

#include "daemon/transport/block_item.h"
#include "daemon/transport/transport.h"

namespace weightd {

#ifdef WEIGHTD_FAILPOINTS
/// Changes the items of one window of a transfer: skip_tensor, skip_zeros, swap_boxes (targets),
/// swap_sources (what is read, not what it is taken for) and off_by_one.
void MutateItems(std::vector<BlockItem>& items);
/// Changes the digests of a step: drop_digest.
void MutateDigests(RankDigests& digests);
#else
inline void MutateItems(std::vector<BlockItem>&) {}
inline void MutateDigests(RankDigests&) {}
#endif

}  // namespace weightd
