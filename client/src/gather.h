// Copies a strided block of host memory into a contiguous one.
#pragma once

#include <cstddef>

#include "daemon/layout/box.h"

namespace weightd {

/// Copies the elements of `part` (coordinates relative to `base`, whose strides are in elements)
/// to `out`, contiguous and row-major. Elements have `element_bytes` bytes and keep their bits.
/// \pre part.num_dims() == strides.size(), and all of it lies in readable memory
void Gather(const std::byte* base, const Dims& strides, const Box& part, size_t element_bytes,
            std::byte* out);

}  // namespace weightd
