// The digest of daemon/layout/digest.h over blocks of host memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "daemon/device/host/cast.h"
#include "daemon/layout/box.h"
#include "daemon/layout/digest.h"
#include "daemon/layout/dtype.h"

namespace weightd::host {

/// Which elements of which source tensor a block holds, in the coordinates of the source tensor.
/// Dimensions are the source tensor's, whatever the memory looks like.
struct DigestPosition {
  uint64_t tensor = 0;
  Shape shape;  ///< global shape of the source tensor
  Dims origin;  ///< of the block in it
};

/// A strided block of memory. Dimension d of `extent` and `strides` is dimension d of the source
/// tensor, so a transposed block has its strides permuted, not its extent. Strides are in elements
/// and not negative.
struct ConstBlock {
  const std::byte* base = nullptr;  ///< first element
  DType dtype = DType::kUnspecified;
  Dims extent;
  Dims strides;
};

/// Digest of a block's elements as they lie in memory. 0 for an empty block.
/// Thread safety: any number of calls at a time.
uint64_t DigestBlock(const RowKernels& kernels, const ConstBlock& block,
                     const DigestPosition& position);

/// The zero-fill word of a block that should hold zeros only: its elements, plus a weight of
/// parameter `param` for every one with a bit set.
uint64_t ZeroFillWord(const ConstBlock& block, uint64_t param);

}  // namespace weightd::host
