// GPU memory of this process: what of it a worker can map, and some that it can.
#pragma once

#include <cstdint>

#include "daemon/base/status.h"

namespace weightd {

/// OK if a worker can map `size_bytes` from `address` on; of 0 bytes, if anything lies there.
/// \error as CudaSegmentSet::Add
Status CheckLendable(const void* address, uint64_t size_bytes);

/// Allocates memory that a worker can map, in the primary context of the GPU of which `like` is
/// memory. Freed by FreeLendable.
/// \error RESOURCE_EXHAUSTED GPU_MEMORY, INVALID_ARGUMENT MEMORY_MOVED, FAILED_PRECONDITION DEVICE
StatusOr<void*> AllocateLendable(const void* like, uint64_t size_bytes);

/// \pre `address` comes from AllocateLendable
void FreeLendable(void* address);

}  // namespace weightd
