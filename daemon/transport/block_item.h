// Plan entries bound to addresses: what one thread copies or digests at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "daemon/device/host/box_copy.h"
#include "daemon/device/host/digest.h"
#include "daemon/layout/box.h"
#include "daemon/layout/tensor_layout.h"
#include "daemon/transport/transport.h"

namespace weightd {

/// One block of one write. All blocks have the dimensions of the source tensor, except a zero
/// fill's, which have the parameter's.
struct BlockItem {
  host::ConstBlock from;  ///< base is nullptr when there is nothing to read (zero fill, verify)
  host::Block to;         ///< base is nullptr when nothing is written (DigestShard)
  host::DigestPosition position;
  size_t word = 0;  ///< where its digest is added
  bool zero_fill = false;
  uint32_t param = 0;
};

/// The part `box` (global coordinates) of a shard that holds `held`.
host::ConstBlock BindSource(const Binding& binding, const Box& held, const Box& box, DType dtype);

/// The target of `write`, narrowed to `box` (coordinates of the parameter).
host::Block BindTarget(const Binding& binding, const Write& write, const Box& box, int source_dims,
                       DType dtype);

/// Appends `item`, cut into parts of about `part_bytes` along one dimension.
void AppendParts(const BlockItem& item, int64_t part_bytes, std::vector<BlockItem>& parts);

/// Cuts a box into row-major parts of at most `max_elements` (at least 1) and appends them.
void AppendChunks(const Box& box, int64_t max_elements, std::vector<Box>& chunks);

}  // namespace weightd
