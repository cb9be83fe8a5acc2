#include "daemon/device/host/box_copy.h"

#include <cstring>

#include "daemon/base/status.h"
#include "daemon/device/host/block_walk.h"

namespace weightd::host {
namespace {

// One copy's constants.
struct Job {
  const RowKernels& kernels;
  RowCast kernel;
  int64_t from_size;
  int64_t to_size;
  int64_t count_unit;  // what the kernel counts, per element: 1, or bytes for a plain copy
  bool stream;
};

// Casts `count` contiguous elements and returns their digest (0 without weights).
uint64_t CastRow(const Job& job, const RowWeights* weights, const std::byte* from, std::byte* to,
                 int64_t row, int64_t column, int64_t count) {
  const auto units = [&](int64_t n) { return static_cast<size_t>(n * job.count_unit); };
  if (weights == nullptr) return job.kernel(from, to, units(count), nullptr, job.stream);
  uint64_t sum = 0;
  ForEachBlockPart(
      weights->first_column() + column, count, job.to_size,
      [&](int64_t first, int64_t part, const uint32_t* words, int64_t block) {
        sum += weights->Weight(row, block) * job.kernel(from + first * job.from_size,
                                                        to + first * job.to_size, units(part),
                                                        words, job.stream);
      },
      [&](int64_t first, int64_t byte, int64_t block) {
        std::byte* out = to + first * job.to_size;
        job.kernel(from + first * job.from_size, out, units(1), nullptr, false);
        uint32_t bits = 0;
        std::memcpy(&bits, out, static_cast<size_t>(job.to_size));
        sum += weights->Weight(row, block) *
               ElementTerm(bits, static_cast<unsigned>(job.to_size), static_cast<uint64_t>(byte));
      });
  return sum;
}

// Rows contiguous on both sides.
uint64_t CopyRows(const Job& job, const ConstBlock& from, const Block& to,
                  const RowWeights* weights, const Dims& row_strides) {
  const int last = from.extent.size() - 1;
  const int64_t columns = last < 0 ? 1 : from.extent[last];
  Dims outer = from.extent;
  if (last >= 0) outer[last] = 1;
  uint64_t sum = 0;
  ForEachIndex(outer, from.strides, to.strides, row_strides,
               [&](int64_t at, int64_t put, int64_t row) {
                 sum += CastRow(job, weights, from.base + at * job.from_size,
                                to.base + put * job.to_size, row, 0, columns);
               });
  return sum;
}

// Everything else, through a tile of source rows on each side.
uint64_t CopyTiles(const Job& job, const ConstBlock& from, const Block& to,
                   const RowWeights* weights, const Dims& row_strides) {
  alignas(64) std::byte gathered[kTile * kTile * 8];
  alignas(64) std::byte tile[kTile * kTile * 8];
  const int last = from.extent.size() - 1;
  const int cross = CrossDim(from.extent, to.strides);
  const auto stride = [cross](const Dims& strides) { return cross < 0 ? 0 : strides[cross]; };
  const int64_t rows = cross < 0 ? 1 : from.extent[cross];
  const int64_t columns = from.extent[last];
  const int64_t from_row = stride(from.strides), from_column = from.strides[last];
  const int64_t to_row = stride(to.strides), to_column = to.strides[last];
  Dims outer = from.extent;
  outer[last] = 1;
  if (cross >= 0) outer[cross] = 1;
  uint64_t sum = 0;
  const auto copy_tile = [&](int64_t at, int64_t put, int64_t row, int64_t c, int64_t r) {
    const int64_t width = std::min(kTile, columns - c);
    const int64_t height = std::min(kTile, rows - r);
    const std::byte* in = from.base + (at + r * from_row + c * from_column) * job.from_size;
    int64_t in_row = from_row;
    if (from_column != 1) {
      CopyStrided(static_cast<size_t>(job.from_size), in, from_row, from_column, gathered, kTile, 1,
                  height, width);
      in = gathered;
      in_row = kTile;
    }
    for (int64_t i = 0; i < height; ++i) {
      sum += CastRow(job, weights, in + i * in_row * job.from_size, tile + i * kTile * job.to_size,
                     row + (r + i) * stride(row_strides), c, width);
    }
    std::byte* out = to.base + (put + r * to_row + c * to_column) * job.to_size;
    CopyStrided(static_cast<size_t>(job.to_size), tile, 1, kTile, out, to_column, to_row, width,
                height);
  };
  ForEachIndex(outer, from.strides, to.strides, row_strides,
               [&](int64_t at, int64_t put, int64_t row) {
                 for (int64_t c = 0; c < columns; c += kTile) {
                   for (int64_t r = 0; r < rows; r += kTile) copy_tile(at, put, row, c, r);
                 }
               });
  return sum;
}

// Joins neighbouring dimensions that lie behind each other on both sides. Without a digest the
// source's rows need not be kept apart.
void MergeDims(ConstBlock& from, Block& to) {
  Dims extent, from_strides, to_strides;
  for (int d = 0; d < from.extent.size(); ++d) {
    if (from.extent[d] == 1) continue;
    const int top = extent.size() - 1;
    if (top >= 0 && from_strides[top] == from.extent[d] * from.strides[d] &&
        to_strides[top] == from.extent[d] * to.strides[d]) {
      extent[top] *= from.extent[d];
      from_strides[top] = from.strides[d];
      to_strides[top] = to.strides[d];
      continue;
    }
    extent.push_back(from.extent[d]);
    from_strides.push_back(from.strides[d]);
    to_strides.push_back(to.strides[d]);
  }
  from.extent = to.extent = extent;
  from.strides = from_strides;
  to.strides = to_strides;
}

}  // namespace

uint64_t CopyBlock(const RowKernels& kernels, const ConstBlock& from, const Block& to,
                   const DigestPosition* position, bool stream) {
  WEIGHTD_CHECK(from.extent == to.extent && CanCast(from.dtype, to.dtype));
  if (NumElements(from.extent) == 0) return 0;
  ConstBlock in = from;
  Block out = to;
  const auto to_size = static_cast<int64_t>(SizeBytes(to.dtype));
  Job job{
      kernels, kernels.Find(from.dtype, to.dtype),   static_cast<int64_t>(SizeBytes(from.dtype)),
      to_size, from.dtype == to.dtype ? to_size : 1, stream};
  Dims row_strides;
  if (position == nullptr) {
    MergeDims(in, out);
    row_strides = Dims::Filled(in.extent.size(), 0);
  } else {
    WEIGHTD_CHECK(position->shape.size() == from.extent.size());
    row_strides = RowNumberStrides(position->shape);
  }
  const RowWeights weights(position == nullptr ? DigestPosition{} : *position, to_size);
  const RowWeights* used = position == nullptr ? nullptr : &weights;
  const int last = in.extent.size() - 1;
  const bool rows =
      last < 0 || in.extent[last] == 1 || (in.strides[last] == 1 && out.strides[last] == 1);
  if (!rows) {
    job.stream = false;
    return CopyTiles(job, in, out, used, row_strides);
  }
  const uint64_t sum = CopyRows(job, in, out, used, row_strides);
  if (stream) StoreFence();
  return sum;
}

void ZeroBlock(const Block& to) {
  if (NumElements(to.extent) == 0) return;
  const auto size = static_cast<int64_t>(SizeBytes(to.dtype));
  const int last = to.extent.size() - 1;
  Dims outer = to.extent;
  const bool row = last >= 0 && to.strides[last] == 1;
  if (row) outer[last] = 1;
  const auto bytes = static_cast<size_t>((row ? to.extent[last] : 1) * size);
  ForEachIndex(outer, to.strides, to.strides, to.strides,
               [&](int64_t at, int64_t, int64_t) { std::memset(to.base + at * size, 0, bytes); });
}

}  // namespace weightd::host
