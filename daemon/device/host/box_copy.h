// Copies a block of a source tensor to its place in a parameter: any strides and permutation, cast
// and digest in the same pass.
#pragma once

#include <cstddef>
#include <cstdint>

#include "daemon/device/host/cast.h"
#include "daemon/device/host/digest.h"
#include "daemon/layout/box.h"
#include "daemon/layout/dtype.h"

namespace weightd::host {

/// A block to be written. As ConstBlock: dimensions are the source tensor's.
struct Block {
  std::byte* base = nullptr;
  DType dtype = DType::kUnspecified;
  Dims extent;
  Dims strides;
};

/// Copies `from` to `to`, casting if the dtypes differ. With `position` also returns the digest of
/// what was written (the elements in to.dtype), else 0. `stream`: write around the caches; the call
/// ends with a store fence. Blocks.
/// \pre equal extents, CanCast(from.dtype, to.dtype), no overlap
/// Thread safety: any number of calls at a time on disjoint blocks.
uint64_t CopyBlock(const RowKernels& kernels, const ConstBlock& from, const Block& to,
                   const DigestPosition* position, bool stream);

/// Writes zero bits to every element. `extent` and `strides` in any order of dimensions.
void ZeroBlock(const Block& to);

}  // namespace weightd::host
