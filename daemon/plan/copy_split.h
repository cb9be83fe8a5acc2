// Cuts a copy into parts of bounded size.
#pragma once

#include <cstdint>

#include "daemon/layout/tensor_layout.h"
#include "daemon/plan/copy_list.h"

namespace weightd {

/// Appends `copy`, a copy of `write` into elements of `element_bytes`, cut along the outermost
/// dimensions until the parts have at most `most_bytes` or are single elements. Deterministic.
void SplitCopy(const Copy& copy, const Write& write, uint64_t element_bytes, uint64_t most_bytes,
               CopyList& list);

}  // namespace weightd
