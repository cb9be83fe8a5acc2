#include "daemon/device/host/digest.h"

#include <cstring>

#include "daemon/base/status.h"
#include "daemon/device/host/block_walk.h"

namespace weightd::host {
namespace {

// Rows that are contiguous in memory.
uint64_t DigestRows(const RowKernels& kernels, const ConstBlock& block, const RowWeights& weights,
                    const Dims& row_strides) {
  const int last = block.extent.size() - 1;
  const int64_t columns = last < 0 ? 1 : block.extent[last];
  Dims outer = block.extent;
  if (last >= 0) outer[last] = 1;
  const auto size = static_cast<int64_t>(SizeBytes(block.dtype));
  uint64_t sum = 0;
  ForEachIndex(outer, block.strides, row_strides, row_strides,
               [&](int64_t at, int64_t row, int64_t) {
                 sum += DigestRow(kernels, weights, block.base + at * size, row, 0, columns);
               });
  return sum;
}

// Rows that are not: gathered tile by tile, following the memory's own order.
uint64_t DigestTiles(const RowKernels& kernels, const ConstBlock& block, const RowWeights& weights,
                     const Dims& row_strides) {
  alignas(64) std::byte tile[kTile * kTile * 8];
  const int last = block.extent.size() - 1;
  const int cross = CrossDim(block.extent, block.strides);
  const int64_t rows = cross < 0 ? 1 : block.extent[cross];
  const int64_t row_step = cross < 0 ? 0 : block.strides[cross];
  const int64_t number_step = cross < 0 ? 0 : row_strides[cross];
  const int64_t columns = block.extent[last];
  const int64_t column_step = block.strides[last];
  Dims outer = block.extent;
  outer[last] = 1;
  if (cross >= 0) outer[cross] = 1;
  const size_t size_bytes = SizeBytes(block.dtype);
  const auto size = static_cast<int64_t>(size_bytes);
  uint64_t sum = 0;
  ForEachIndex(
      outer, block.strides, row_strides, row_strides, [&](int64_t at, int64_t row, int64_t) {
        for (int64_t c = 0; c < columns; c += kTile) {
          const int64_t width = std::min(kTile, columns - c);
          for (int64_t r = 0; r < rows; r += kTile) {
            const int64_t height = std::min(kTile, rows - r);
            const std::byte* from = block.base + (at + r * row_step + c * column_step) * size;
            CopyStrided(size_bytes, from, column_step, row_step, tile, 1, kTile, width, height);
            for (int64_t i = 0; i < height; ++i) {
              sum += DigestRow(kernels, weights, tile + i * kTile * size,
                               row + (r + i) * number_step, c, width);
            }
          }
        }
      });
  return sum;
}

template <class T>
int64_t CountNonZero(const ConstBlock& block) {
  const int last = block.extent.size() - 1;
  Dims outer = block.extent;
  if (last >= 0) outer[last] = 1;
  const int64_t columns = last < 0 ? 1 : block.extent[last];
  const int64_t step = last < 0 ? 0 : block.strides[last];
  int64_t found = 0;
  ForEachIndex(
      outer, block.strides, block.strides, block.strides, [&](int64_t at, int64_t, int64_t) {
        for (int64_t i = 0; i < columns; ++i) {
          T value;
          std::memcpy(&value, block.base + (at + i * step) * static_cast<int64_t>(sizeof(T)),
                      sizeof(T));
          found += value != 0 ? 1 : 0;
        }
      });
  return found;
}

}  // namespace

uint64_t DigestBlock(const RowKernels& kernels, const ConstBlock& block,
                     const DigestPosition& position) {
  WEIGHTD_CHECK(block.extent.size() == block.strides.size());
  WEIGHTD_CHECK(block.extent.size() == position.shape.size());
  if (NumElements(block.extent) == 0) return 0;
  const RowWeights weights(position, static_cast<int64_t>(SizeBytes(block.dtype)));
  const Dims row_strides = RowNumberStrides(position.shape);
  const int last = block.extent.size() - 1;
  if (last < 0 || block.strides[last] == 1 || block.extent[last] == 1) {
    return DigestRows(kernels, block, weights, row_strides);
  }
  return DigestTiles(kernels, block, weights, row_strides);
}

uint64_t ZeroFillWord(const ConstBlock& block, uint64_t param) {
  const int64_t elements = NumElements(block.extent);
  if (elements == 0) return 0;
  int64_t found = 0;
  switch (SizeBytes(block.dtype)) {
    case 1:
      found = CountNonZero<uint8_t>(block);
      break;
    case 2:
      found = CountNonZero<uint16_t>(block);
      break;
    case 4:
      found = CountNonZero<uint32_t>(block);
      break;
    default:
      found = CountNonZero<uint64_t>(block);
      break;
  }
  return static_cast<uint64_t>(elements) +
         RowWeight(kZeroFillTensor, param, 0) * static_cast<uint64_t>(found);
}

}  // namespace weightd::host
