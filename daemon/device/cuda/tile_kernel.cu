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

// The digest of columns [begin, end) of a row of the square, which lie in one digest block, before
// the row weight. `byte`: where column 0 of the square would lie in that block.
template <class T>
__device__ __forceinline__ uint64_t DigestColumns(const T* row, unsigned step, uint32_t begin,
                                                  uint32_t end, uint32_t byte) {
  uint64_t sum = 0;
  if (sizeof(T) == 2 && byte % 4 == 0 && (end - begin) % 2 == 0) {  // two elements make a word
#pragma unroll 4
    for (uint32_t c = begin; c < end; c += 2) {
      const uint32_t word =
          static_cast<uint32_t>(row[c * step]) | static_cast<uint32_t>(row[(c + 1) * step]) << 16;
      sum += (uint64_t{word} + kValueMask) * kTables.weights[(byte + 2 * c) / 4];
    }
    return sum;
  }
#pragma unroll 4
  for (uint32_t c = begin; c < end; ++c) {
    sum += Term(row[c * step], sizeof(T), byte + c * sizeof(T), kTables.weights);
  }
  return sum;
}

// The digest of a square: every thread takes a quarter of a row of the source tensor. Where its
// columns run along neither side of the square, every element has a row of its own.
template <class T>
__device__ __noinline__ uint64_t DigestSquare(const SharedTile& shared, const Square square) {
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
  const uint64_t row = square.row + r * rows.row;
  const auto byte_of = [&](uint32_t c) {
    return (square.column + uint64_t{c} * columns.column) * sizeof(T);
  };
  const uint64_t block = byte_of(begin) / kDigestBlockBytes;
  if (columns.column == 1 && block == byte_of(end - 1) / kDigestBlockBytes) {
    // Of column 0, before the block if need be: the sum with a column's offset wraps back.
    const auto first = static_cast<uint32_t>(byte_of(0) - block * kDigestBlockBytes);
    return DigestColumns(tile, step, begin, end, first) * RowWeightOfKey(box.key, row, block);
  }
  uint64_t sum = 0;
#pragma unroll 1
  for (uint32_t c = begin; c < end; ++c) {
    const auto in_block = static_cast<unsigned>(byte_of(c) % kDigestBlockBytes);
    sum += Term(tile[c * step], sizeof(T), in_block, kTables.weights) *
           RowWeightOfKey(box.key, row + c * columns.row, byte_of(c) / kDigestBlockBytes);
  }
  return sum;
}

template <class T, unsigned kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T values[kCount];
};

// Reads a square along source memory, kVector elements at a time, and keeps it as it will be
// written.
template <class From, class To, BoxKind kKind, unsigned kVector>
__device__ __forceinline__ void ReadSquare(SharedTile& shared, const Square& square) {
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

// Writes a square along target memory.
template <class To, unsigned kVector>
__device__ __forceinline__ void WriteSquare(const SharedTile& shared, const Square& square) {
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

// Out of line, so that each kind of square has the registers to itself.
template <class From, class To, BoxKind kKind = BoxKind::kCopy>
__device__ __noinline__ uint64_t RunSquare(SharedTile& shared, uint32_t first_q) {
  const Square square = SquareOf(shared, first_q);
  if (shared.box.vectors) {
    ReadSquare<From, To, kKind, kTileVector>(shared, square);
  } else {
    ReadSquare<From, To, kKind, 1>(shared, square);
  }
  __syncthreads();
  const uint64_t sum = shared.box.digest ? DigestSquare<To>(shared, square) : 0;
  if (shared.box.to_size == 0) return sum;
  if (shared.box.vectors) {
    WriteSquare<To, kTileVector>(shared, square);
  } else {
    WriteSquare<To, 1>(shared, square);
  }
  return sum;
}

__device__ __forceinline__ uint64_t RunKind(SharedTile& shared, uint32_t first_q) {
  switch (shared.box.kind) {
    case BoxKind::kFloat32ToBFloat16:
      return RunSquare<uint32_t, uint16_t, BoxKind::kFloat32ToBFloat16>(shared, first_q);
    case BoxKind::kFloat32ToFloat16:
      return RunSquare<uint32_t, uint16_t, BoxKind::kFloat32ToFloat16>(shared, first_q);
    case BoxKind::kFloat16ToBFloat16:
      return RunSquare<uint16_t, uint16_t, BoxKind::kFloat16ToBFloat16>(shared, first_q);
    case BoxKind::kBFloat16ToFloat16:
      return RunSquare<uint16_t, uint16_t, BoxKind::kBFloat16ToFloat16>(shared, first_q);
    case BoxKind::kFloat16ToFloat32:
      return RunSquare<uint16_t, uint32_t, BoxKind::kFloat16ToFloat32>(shared, first_q);
    case BoxKind::kBFloat16ToFloat32:
      return RunSquare<uint16_t, uint32_t, BoxKind::kBFloat16ToFloat32>(shared, first_q);
    default:
      break;
  }
  switch (shared.box.from_size) {
    case 1:
      return RunSquare<uint8_t, uint8_t>(shared, first_q);
    case 2:
      return RunSquare<uint16_t, uint16_t>(shared, first_q);
    default:
      return RunSquare<uint32_t, uint32_t>(shared, first_q);
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
        sum += RunKind(shared, q);
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
