// How the block loops see a block: rows along the last dimension of the source tensor, the other
// dimensions walked by an odometer that also knows the row's number in the global tensor.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "daemon/device/host/digest.h"
#include "daemon/layout/box.h"
#include "daemon/layout/digest.h"

namespace weightd::host {

/// Elements on the side of a tile: two cache lines of a 2-byte type, 32 KiB of an 8-byte type.
inline constexpr int64_t kTile = 64;

/// Distance between the numbers of neighbouring rows along each dimension; 0 for the last one.
inline Dims RowNumberStrides(const Shape& shape) {
  Dims strides = Dims::Filled(shape.size(), 0);
  int64_t rows = 1;
  for (int d = shape.size() - 2; d >= 0; --d) {
    strides[d] = rows;
    rows *= shape[d];
  }
  return strides;
}

/// Calls fn(offset_a, offset_b, offset_c) for every index of `extent`, row-major, where the offsets
/// are the dot products of the index with three lists of strides.
template <typename Fn>
void ForEachIndex(const Dims& extent, const Dims& a, const Dims& b, const Dims& c, Fn&& fn) {
  std::array<int64_t, kMaxDims> index{};
  int64_t at_a = 0, at_b = 0, at_c = 0;
  while (true) {
    fn(at_a, at_b, at_c);
    int d = extent.size() - 1;
    for (; d >= 0; --d) {
      const auto i = static_cast<size_t>(d);
      at_a += a[d];
      at_b += b[d];
      at_c += c[d];
      if (++index[i] < extent[d]) break;
      at_a -= a[d] * extent[d];
      at_b -= b[d] * extent[d];
      at_c -= c[d] * extent[d];
      index[i] = 0;
    }
    if (d < 0) return;
  }
}

/// Calls fn(first, count, weights, block) for the parts of columns [column, column + count) that
/// lie in one digest block and start a word; `first` counts from `column`. A part that starts
/// inside a word goes element by element to single(first, byte in block, block).
template <typename Whole, typename Single>
void ForEachBlockPart(int64_t column, int64_t count, int64_t size_bytes, Whole&& whole,
                      Single&& single) {
  int64_t done = 0;
  while (done < count) {
    const int64_t byte = (column + done) * size_bytes;
    const int64_t block = byte / kDigestBlockBytes;
    const int64_t in_block = byte % kDigestBlockBytes;
    if (in_block % 4 != 0) {
      single(done, in_block, block);
      ++done;
      continue;
    }
    const int64_t fits = (kDigestBlockBytes - in_block) / size_bytes;
    const int64_t part = std::min(fits, count - done);
    whole(done, part, &kWordWeights[static_cast<size_t>(in_block / 4)], block);
    done += part;
  }
}

/// Where the rows of a block lie in the digest. Without a position all weights are absent.
class RowWeights {
 public:
  RowWeights(const DigestPosition& position, int64_t size_bytes)
      : key_(TensorKey(position.tensor)), size_bytes_(size_bytes) {
    const int last = position.shape.size() - 1;
    const Dims strides = RowNumberStrides(position.shape);
    for (int d = 0; d < last; ++d) first_row_ += position.origin[d] * strides[d];
    first_column_ = last < 0 ? 0 : position.origin[last];
  }

  uint64_t Weight(int64_t row, int64_t block) const {
    return RowWeightOfKey(key_, static_cast<uint64_t>(first_row_ + row),
                          static_cast<uint64_t>(block));
  }
  int64_t first_column() const { return first_column_; }
  int64_t size_bytes() const { return size_bytes_; }

 private:
  uint64_t key_;
  int64_t size_bytes_;
  int64_t first_row_ = 0;
  int64_t first_column_ = 0;
};

/// Digest of `count` contiguous elements: row `row` and column `column` of the block.
uint64_t DigestRow(const RowKernels& kernels, const RowWeights& weights, const std::byte* data,
                   int64_t row, int64_t column, int64_t count);

/// Copies a two-dimensional piece element by element: element (i, j) from i * a0 + j * a1 to
/// i * b0 + j * b1 (strides in elements). The inner loop runs over j.
void CopyStrided(size_t size_bytes, const std::byte* from, int64_t a0, int64_t a1, std::byte* to,
                 int64_t b0, int64_t b1, int64_t rows, int64_t columns);

/// The dimension beside the last in which a transposed block runs: the one with the smallest
/// positive stride among those longer than 1, or -1.
int CrossDim(const Dims& extent, const Dims& strides);

}  // namespace weightd::host
