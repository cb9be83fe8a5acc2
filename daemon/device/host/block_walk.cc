#include "daemon/device/host/block_walk.h"

#include <cstring>

#include "daemon/base/status.h"

namespace weightd::host {
namespace {

template <class T>
void CopyStridedAs(const std::byte* from, int64_t a0, int64_t a1, std::byte* to, int64_t b0,
                   int64_t b1, int64_t rows, int64_t columns) {
  constexpr auto kSize = static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < rows; ++i) {
    const std::byte* in = from + i * a0 * kSize;
    std::byte* out = to + i * b0 * kSize;
    for (int64_t j = 0; j < columns; ++j) {
      T value;
      std::memcpy(&value, in + j * a1 * kSize, sizeof(T));
      std::memcpy(out + j * b1 * kSize, &value, sizeof(T));
    }
  }
}

}  // namespace

uint64_t DigestRow(const RowKernels& kernels, const RowWeights& weights, const std::byte* data,
                   int64_t row, int64_t column, int64_t count) {
  uint64_t sum = 0;
  const int64_t size = weights.size_bytes();
  ForEachBlockPart(
      weights.first_column() + column, count, size,
      [&](int64_t first, int64_t part, const uint32_t* words, int64_t block) {
        sum += weights.Weight(row, block) *
               kernels.digest(data + first * size, static_cast<size_t>(part * size), words);
      },
      [&](int64_t first, int64_t byte, int64_t block) {
        uint32_t bits = 0;
        std::memcpy(&bits, data + first * size, static_cast<size_t>(size));
        sum += weights.Weight(row, block) *
               ElementTerm(bits, static_cast<unsigned>(size), static_cast<uint64_t>(byte));
      });
  return sum;
}

void CopyStrided(size_t size_bytes, const std::byte* from, int64_t a0, int64_t a1, std::byte* to,
                 int64_t b0, int64_t b1, int64_t rows, int64_t columns) {
  switch (size_bytes) {
    case 1:
      return CopyStridedAs<uint8_t>(from, a0, a1, to, b0, b1, rows, columns);
    case 2:
      return CopyStridedAs<uint16_t>(from, a0, a1, to, b0, b1, rows, columns);
    case 4:
      return CopyStridedAs<uint32_t>(from, a0, a1, to, b0, b1, rows, columns);
    default:
      WEIGHTD_CHECK(size_bytes == 8);
      return CopyStridedAs<uint64_t>(from, a0, a1, to, b0, b1, rows, columns);
  }
}

int CrossDim(const Dims& extent, const Dims& strides) {
  int best = -1;
  for (int d = 0; d + 1 < extent.size(); ++d) {
    if (extent[d] <= 1) continue;
    if (best < 0 || strides[d] < strides[best]) best = d;
  }
  return best;
}

}  // namespace weightd::host
