// Where the units and tiles of a descriptor lie: the arithmetic that the kernels run and that the
// host tests prove, free of CUDA.
#pragma once

#include <cstdint>

#include "daemon/device/cuda/box_desc.h"
#include "daemon/layout/digest.h"

namespace weightd::cuda {

/// Elements on the side of a transposed tile.
inline constexpr uint32_t kTileSide = 64;

/// Bytes of an element as it is written, or as it lies in memory if nothing is written.
constexpr uint32_t UnitSize(const BoxDesc& box) {
  return box.to_size != 0 ? box.to_size : box.from_size;
}

/// A unit of the rows kernel: `count` elements along dims[0].
struct UnitPlace {
  uint64_t from = 0;  ///< bytes from the box's first element
  uint64_t to = 0;
  uint64_t row = 0;  ///< in the source tensor
  uint64_t column = 0;
  uint32_t count = 0;
};

/// \pre unit < box.units
constexpr UnitPlace PlaceOfUnit(const BoxDesc& box, uint32_t unit) {
  uint32_t outer = unit / box.parts;
  const uint32_t part = unit - outer * box.parts;
  const uint32_t per_part = static_cast<uint32_t>(kDigestBlockBytes) / UnitSize(box);
  const uint32_t begin = part == 0 ? 0 : box.first_part + (part - 1) * per_part;
  const uint32_t end = part == 0 ? box.first_part : begin + per_part;
  const BoxDim& fast = box.dims[0];
  UnitPlace place;
  place.from = begin * fast.from;
  place.to = begin * fast.to;
  place.row = box.first_row + begin * fast.row;
  place.column = box.first_column + uint64_t{begin} * fast.column;
  place.count = (end < fast.extent ? end : fast.extent) - begin;
  for (int d = box.num_dims - 1; d > 0; --d) {
    const BoxDim& dim = box.dims[d];
    uint32_t index = outer;
    if (d > 1) {
      index = outer % dim.extent;
      outer /= dim.extent;
    }
    place.from += index * dim.from;
    place.to += index * dim.to;
    place.row += index * dim.row;
    place.column += uint64_t{index} * dim.column;
  }
  return place;
}

/// A tile of the tiles kernel: `p_count` elements along dims[0], `q_count` along dims[1].
struct TilePlace {
  uint64_t from = 0;
  uint64_t to = 0;
  uint64_t row = 0;
  uint64_t column = 0;
  uint32_t p_count = 0;
  uint32_t q_count = 0;
};

/// \pre tile < box.units
constexpr TilePlace PlaceOfTile(const BoxDesc& box, uint32_t tile) {
  const BoxDim& p = box.dims[0];
  const BoxDim& q = box.dims[1];
  uint32_t outer = tile / box.parts;
  const uint32_t p_begin = (tile - outer * box.parts) * kTileSide;
  const uint32_t q_begin = (outer % box.first_part) * kTileSide;
  outer /= box.first_part;
  TilePlace place;
  place.from = p_begin * p.from + q_begin * q.from;
  place.to = p_begin * p.to + q_begin * q.to;
  place.row = box.first_row + p_begin * p.row + q_begin * q.row;
  place.column = box.first_column + uint64_t{p_begin} * p.column + uint64_t{q_begin} * q.column;
  place.p_count = p.extent - p_begin < kTileSide ? p.extent - p_begin : kTileSide;
  place.q_count = q.extent - q_begin < kTileSide ? q.extent - q_begin : kTileSide;
  for (int d = box.num_dims - 1; d > 1; --d) {
    const BoxDim& dim = box.dims[d];
    const uint32_t index = outer % dim.extent;
    outer /= dim.extent;
    place.from += index * dim.from;
    place.to += index * dim.to;
    place.row += index * dim.row;
    place.column += uint64_t{index} * dim.column;
  }
  return place;
}

/// True if `bytes` more from `offset` on, plus the reach of every dimension, stay inside
/// `range_bytes`; never overflows. kFrom: the source side, else the target side.
/// \pre range_bytes < 2^62
template <bool kFrom>
constexpr bool SideInside(const BoxDesc& box, uint64_t offset, uint64_t bytes,
                          uint64_t range_bytes) {
  if (offset > range_bytes || bytes > range_bytes - offset) return false;
  uint64_t used = offset + bytes;
  for (int d = 0; d < box.num_dims; ++d) {
    const uint64_t steps = box.dims[d].extent - 1;
    const uint64_t stride = kFrom ? box.dims[d].from : box.dims[d].to;
    const uint64_t high = steps * (stride >> 32);
    const uint64_t low = steps * (stride & 0xffffffffU);
    if (high >> 30 != 0 || low > range_bytes) return false;
    used += (high << 32) + low;
    if (used > range_bytes) return false;
  }
  return true;
}

/// True if a box stays inside its ranges. What the kernels check before they touch memory.
constexpr bool Inside(const BoxDesc& box, const MemoryRange* ranges, uint32_t num_ranges) {
  if (box.from_size != 0 &&
      (box.from_range >= num_ranges ||
       !SideInside<true>(box, box.from_offset, box.from_size, ranges[box.from_range].size_bytes))) {
    return false;
  }
  return box.to_size == 0 ||
         (box.to_range < num_ranges &&
          SideInside<false>(box, box.to_offset, box.to_size, ranges[box.to_range].size_bytes));
}

}  // namespace weightd::cuda
