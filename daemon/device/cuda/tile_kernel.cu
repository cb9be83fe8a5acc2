// Transposed boxes: a block reads a tile along source memory and writes it along target memory,
// through shared memory. Also digests memory whose rows run across it.
#include <cuda_runtime.h>

#include "daemon/device/cuda/device_math.cuh"
#include "daemon/device/cuda/kernel_args.h"

namespace weightd::cuda {
namespace {

// Columns of a row of the source tensor that one thread digests.
constexpr unsigned kDigestColumns = kTileSide * kTileSide / kBoxThreads;

__device__ const DigestTables kTables = MakeDigestTables();

// What the threads of a block share: the tile's elements and all that is the same for each of them.
struct SharedTile {
  // One element more per row (two of 2 bytes, four of 1) keeps a column off a single bank.
  alignas(16) unsigned char bytes[kTileSide * (kTileSide + 1) * 4];
  alignas(16) BoxDesc box;
  TilePlace place;
  uint64_t from;  // addresses of the tile's first elements
  uint64_t to;
  bool refused;
  uint64_t sums[kBoxThreads / 32];
};

// The square of a tile that is under way.
struct Square {
  const unsigned char* from;
  unsigned char* to;
  uint64_t row;
  uint64_t column;
  uint32_t p_count;
  uint32_t q_count;
};

__device__ __forceinline__ Square SquareOf(const SharedTile& shared, uint32_t first_q) {
  const TilePlace& place = shared.place;
  const BoxDim& q = shared.box.dims[1];
  return {reinterpret_cast<const unsigned char*>(shared.from + first_q * q.from),
          reinterpret_cast<unsigned char*>(shared.to + first_q * q.to),
          place.row + first_q * q.row,
          place.column + uint64_t{first_q} * q.column,
          place.p_count,
          min(kTileSide, place.q_count - first_q)};
}

template <class T>
constexpr unsigned kPitch = kTileSide + (sizeof(T) >= 4 ? 1 : 4 / sizeof(T));

// The digest of a tile: every thread takes a quarter of a row of the source tensor. Where its
// columns run along neither side of the tile, every element has a row of its own.
template <class T>
__device__ __noinline__ uint64_t DigestTile(const SharedTile& shared, const Square square) {
  const BoxDesc& box = shared.box;
  const bool columns_along_p = box.dims[0].column != 0;
  const BoxDim rows = box.dims[columns_along_p ? 1 : 0];
  const BoxDim columns = box.dims[columns_along_p ? 0 : 1];
  const uint32_t num_rows = columns_along_p ? square.q_count : square.p_count;
  const uint32_t num_columns = columns_along_p ? square.p_count : square.q_count;
  const uint32_t r = threadIdx.x % kTileSide;
  const uint32_t begin = threadIdx.x / kTileSide * kDigestColumns;
  const uint32_t end = min(begin + kDigestColumns, num_columns);
  if (r >= num_rows || begin >= end) return 0;
  const T* tile = reinterpret_cast<const T*>(shared.bytes) + r * (columns_along_p ? kPitch<T> : 1);
  const unsigned step = columns_along_p ? 1 : kPitch<T>;
  const uint64_t first = square.column * sizeof(T);
  const uint64_t row = square.row + r * rows.row;
  const auto block_of = [&](uint32_t c) {
    return (first + uint64_t{c} * columns.column * sizeof(T)) / kDigestBlockBytes;
  };
  const auto term = [&](uint32_t c) {
    const auto byte = static_cast<unsigned>(first + c * columns.column * sizeof(T));
    return Term(tile[c * step], sizeof(T), byte % kDigestBlockBytes, kTables.weights);
  };
  uint64_t sum = 0;
  if (columns.row == 0 && block_of(begin) == block_of(end - 1)) {
#pragma unroll 4
    for (uint32_t c = begin; c < end; ++c) sum += term(c);
    return sum * RowWeightOfKey(box.key, row, block_of(begin));
  }
#pragma unroll 1
  for (uint32_t c = begin; c < end; ++c) {
    sum += term(c) * RowWeightOfKey(box.key, row + c * columns.row, block_of(c));
  }
  return sum;
}

template <class T, unsigned kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T values[kCount];
};

// Reads the tile along source memory, kVector elements at a time, and keeps it as it will be
// written.
template <class From, class To, BoxKind kKind, unsigned kVector>
__device__ __forceinline__ void ReadTile(SharedTile& shared, const Square& square) {
  constexpr unsigned kPerRow = kTileSide / kVector, kRows = kBoxThreads / kPerRow;
  constexpr unsigned kBatch = kTileSide / kRows < 4 ? kTileSide / kRows : 4;
  const uint32_t p = threadIdx.x % kPerRow * kVector, first = threadIdx.x / kPerRow;
  if (p >= square.p_count) return;
  const uint64_t step = kRows * shared.box.dims[1].from;
  const unsigned char* from =
      square.from + p * shared.box.dims[0].from + first * shared.box.dims[1].from;
  To* tile = reinterpret_cast<To*>(shared.bytes) + first * kPitch<To> + p;
#pragma unroll 1
  for (uint32_t q = first; q < square.q_count; q += kRows * kBatch) {
    Vector<From, kVector> in[kBatch];
#pragma unroll
    for (unsigned i = 0; i < kBatch; ++i) {
      if (q + i * kRows < square.q_count) {
        in[i] = *reinterpret_cast<const Vector<From, kVector>*>(from);
      }
      from += step;
    }
#pragma unroll
    for (unsigned i = 0; i < kBatch; ++i) {
#pragma unroll
      for (unsigned j = 0; j < kVector; ++j) {
        tile[j] = static_cast<To>(CastElement(kKind, in[i].values[j]));
      }
      tile += kRows * kPitch<To>;
    }
  }
}

// Writes the tile along target memory.
template <class To, unsigned kVector>
__device__ __forceinline__ void WriteTile(const SharedTile& shared, const Square& square) {
  constexpr unsigned kPerRow = kTileSide / kVector, kRows = kBoxThreads / kPerRow;
  const uint32_t q = threadIdx.x % kPerRow * kVector, first = threadIdx.x / kPerRow;
  if (q >= square.q_count) return;
  const uint64_t step = kRows * shared.box.dims[0].to;
  unsigned char* to = square.to + q * shared.box.dims[1].to + first * shared.box.dims[0].to;
  const To* tile = reinterpret_cast<const To*>(shared.bytes) + q * kPitch<To> + first;
#pragma unroll 4
  for (uint32_t p = first; p < square.p_count; p += kRows) {
    Vector<To, kVector> out;
#pragma unroll
    for (unsigned j = 0; j < kVector; ++j) out.values[j] = tile[j * kPitch<To>];
    *reinterpret_cast<Vector<To, kVector>*>(to) = out;
    to += step;
    tile += kRows;
  }
}

// Out of line, so that each kind of tile has the registers to itself.
template <class From, class To, BoxKind kKind = BoxKind::kCopy>
__device__ __noinline__ uint64_t RunTile(SharedTile& shared, uint32_t first_q) {
  const Square square = SquareOf(shared, first_q);
  if (shared.box.vectors) {
    ReadTile<From, To, kKind, kTileVector>(shared, square);
  } else {
    ReadTile<From, To, kKind, 1>(shared, square);
  }
  __syncthreads();
  const uint64_t sum = shared.box.digest ? DigestTile<To>(shared, square) : 0;
  if (shared.box.to_size == 0) return sum;
  if (shared.box.vectors) {
    WriteTile<To, kTileVector>(shared, square);
  } else {
    WriteTile<To, 1>(shared, square);
  }
  return sum;
}

__device__ __forceinline__ uint64_t RunBoxTile(SharedTile& shared, uint32_t first_q) {
  switch (shared.box.kind) {
    case BoxKind::kFloat32ToBFloat16:
      return RunTile<uint32_t, uint16_t, BoxKind::kFloat32ToBFloat16>(shared, first_q);
    case BoxKind::kFloat32ToFloat16:
      return RunTile<uint32_t, uint16_t, BoxKind::kFloat32ToFloat16>(shared, first_q);
    case BoxKind::kFloat16ToBFloat16:
      return RunTile<uint16_t, uint16_t, BoxKind::kFloat16ToBFloat16>(shared, first_q);
    case BoxKind::kBFloat16ToFloat16:
      return RunTile<uint16_t, uint16_t, BoxKind::kBFloat16ToFloat16>(shared, first_q);
    case BoxKind::kFloat16ToFloat32:
      return RunTile<uint16_t, uint32_t, BoxKind::kFloat16ToFloat32>(shared, first_q);
    case BoxKind::kBFloat16ToFloat32:
      return RunTile<uint16_t, uint32_t, BoxKind::kBFloat16ToFloat32>(shared, first_q);
    default:
      break;
  }
  switch (shared.box.from_size) {
    case 1:
      return RunTile<uint8_t, uint8_t>(shared, first_q);
    case 2:
      return RunTile<uint16_t, uint16_t>(shared, first_q);
    default:
      return RunTile<uint32_t, uint32_t>(shared, first_q);
  }
}

// Fetches a tile's box and finds its place; the first threads work, the others wait.
__device__ __forceinline__ void Prepare(const BoxArgs& args, uint32_t tile, SharedTile& shared) {
  constexpr unsigned kParts = sizeof(BoxDesc) / sizeof(uint4);
  const uint32_t index = args.box_of_tile[tile];
  if (threadIdx.x < kParts) {
    reinterpret_cast<uint4*>(&shared.box)[threadIdx.x] =
        reinterpret_cast<const uint4*>(args.boxes + index)[threadIdx.x];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const BoxDesc& box = shared.box;
    shared.refused = !Inside(box, args.ranges, args.num_ranges);
    if (shared.refused) {
      atomicMax(args.report, uint64_t{index} + 1);
    } else {
      shared.place = PlaceOfTile(box, tile - box.first_tile);
      shared.from = args.ranges[box.from_range].base + box.from_offset + shared.place.from;
      shared.to =
          box.to_size != 0 ? args.ranges[box.to_range].base + box.to_offset + shared.place.to : 0;
    }
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kBoxThreads, 6) TileKernel(const BoxArgs args) {
  __shared__ SharedTile shared;
  for (uint32_t tile = args.first_tile + blockIdx.x; tile < args.end_tile; tile += gridDim.x) {
    Prepare(args, tile, shared);
    if (!shared.refused) {
      uint64_t sum = 0;
      for (uint32_t q = 0; q < shared.place.q_count; q += kTileSide) {
        if (q != 0) __syncthreads();  // the square before has been read
        sum += RunBoxTile(shared, q);
      }
      if (shared.box.digest) {
        AddToWord<kBoxThreads>(sum, shared.sums, args.words + shared.box.word);
      }
    }
    __syncthreads();  // the next tile overwrites what is shared
  }
}

}  // namespace

int LaunchTiles(const BoxArgs& args, int num_blocks, StreamRef stream) {
  TileKernel<<<static_cast<unsigned>(num_blocks), kBoxThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace weightd::cuda
