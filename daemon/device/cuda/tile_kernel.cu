// Transposed boxes: a block reads a tile along source memory and writes it along target memory,
// through shared memory. Also digests memory whose rows run across it.
#include <cuda_runtime.h>

#include "daemon/device/cuda/box_walk.h"
#include "daemon/device/cuda/device_math.cuh"
#include "daemon/device/cuda/kernel_args.h"

namespace weightd::cuda {
namespace {

constexpr uint32_t kNoWord = ~0U;
constexpr unsigned kSteps = kTileSide * kTileSide / kTileThreads;
constexpr unsigned kStride = kTileThreads / kTileSide;

__device__ const DigestTables kTables = MakeDigestTables();

struct SharedTile {
  // One element more per row (two of 2 bytes, four of 1) keeps a column off a single bank.
  alignas(16) unsigned char bytes[kTileSide * (kTileSide + 1) * 8];
  uint32_t weights[kDigestBlockWords];
};

template <class T>
constexpr unsigned kPitch = kTileSide + (sizeof(T) >= 4 ? 1 : 4 / sizeof(T));

// One thread's part in a tile.
struct Work {
  const BoxDesc& box;
  const TilePlace place;
  const unsigned char* from;
  unsigned char* to;
  SharedTile& shared;
};

// The digest of a tile: every thread takes a quarter of a row of the source tensor. Where its
// columns run along neither side of the tile, every element has a row of its own.
template <class T>
__device__ __noinline__ uint64_t DigestTile(const Work& work) {
  const BoxDesc& box = work.box;
  const bool columns_along_p = box.dims[0].column != 0;
  const BoxDim rows = box.dims[columns_along_p ? 1 : 0];
  const BoxDim columns = box.dims[columns_along_p ? 0 : 1];
  const uint32_t num_rows = columns_along_p ? work.place.q_count : work.place.p_count;
  const uint32_t num_columns = columns_along_p ? work.place.p_count : work.place.q_count;
  const uint32_t r = threadIdx.x % kTileSide;
  const uint32_t begin = threadIdx.x / kTileSide * kSteps;
  const uint32_t end = min(begin + kSteps, num_columns);
  if (r >= num_rows || begin >= end) return 0;
  const T* tile =
      reinterpret_cast<const T*>(work.shared.bytes) + r * (columns_along_p ? kPitch<T> : 1);
  const unsigned step = columns_along_p ? 1 : kPitch<T>;
  uint64_t sum = 0, acc = 0, row_weight = 0;
  uint64_t block = ~uint64_t{0};
#pragma unroll 4
  for (uint32_t c = begin; c < end; ++c) {
    const uint64_t byte = (work.place.column + uint64_t{c} * columns.column) * sizeof(T);
    if (byte / kDigestBlockBytes != block || columns.row != 0) {
      sum += acc * row_weight;
      acc = 0;
      block = byte / kDigestBlockBytes;
      row_weight = RowWeightOfKey(box.key, work.place.row + r * rows.row + c * columns.row, block);
    }
    acc += Term(tile[c * step], sizeof(T), static_cast<unsigned>(byte % kDigestBlockBytes),
                work.shared.weights);
  }
  return sum + acc * row_weight;
}

template <class From, class To, BoxKind kKind = BoxKind::kCopy>
__device__ __forceinline__ uint64_t RunTile(const Work& work) {
  const BoxDesc& box = work.box;
  const uint32_t along = threadIdx.x % kTileSide, across = threadIdx.x / kTileSide;
  To* tile = reinterpret_cast<To*>(work.shared.bytes);
  constexpr unsigned kBatch = sizeof(From) == 8 ? kSteps / 2 : kSteps;
  const unsigned char* from = work.from + along * box.dims[0].from;
  const uint64_t from_step = box.dims[1].from;
#pragma unroll 1
  for (unsigned first = 0; first < kSteps; first += kBatch) {
    From in[kBatch];
#pragma unroll
    for (unsigned i = 0; i < kBatch; ++i) {
      const uint32_t q = across + (first + i) * kStride;
      if (along < work.place.p_count && q < work.place.q_count) {
        in[i] = *reinterpret_cast<const From*>(from + q * from_step);
      }
    }
#pragma unroll
    for (unsigned i = 0; i < kBatch; ++i) {
      const uint32_t q = across + (first + i) * kStride;
      tile[q * kPitch<To> + along] = static_cast<To>(CastElement(kKind, in[i]));
    }
  }
  __syncthreads();
  const uint64_t sum = box.digest ? DigestTile<To>(work) : 0;
  if (box.to_size == 0) return sum;
  unsigned char* to = work.to + along * box.dims[1].to;
#pragma unroll
  for (unsigned i = 0; i < kSteps; ++i) {
    const uint32_t p = across + i * kStride;
    if (along >= work.place.q_count || p >= work.place.p_count) continue;
    *reinterpret_cast<To*>(to + p * box.dims[0].to) = tile[along * kPitch<To> + p];
  }
  return sum;
}

__device__ __forceinline__ uint64_t RunBoxTile(const Work& work) {
  switch (work.box.kind) {
    case BoxKind::kFloat32ToBFloat16:
      return RunTile<uint32_t, uint16_t, BoxKind::kFloat32ToBFloat16>(work);
    case BoxKind::kFloat32ToFloat16:
      return RunTile<uint32_t, uint16_t, BoxKind::kFloat32ToFloat16>(work);
    case BoxKind::kFloat16ToBFloat16:
      return RunTile<uint16_t, uint16_t, BoxKind::kFloat16ToBFloat16>(work);
    case BoxKind::kBFloat16ToFloat16:
      return RunTile<uint16_t, uint16_t, BoxKind::kBFloat16ToFloat16>(work);
    case BoxKind::kFloat16ToFloat32:
      return RunTile<uint16_t, uint32_t, BoxKind::kFloat16ToFloat32>(work);
    case BoxKind::kBFloat16ToFloat32:
      return RunTile<uint16_t, uint32_t, BoxKind::kBFloat16ToFloat32>(work);
    default:
      break;
  }
  switch (work.box.from_size) {
    case 1:
      return RunTile<uint8_t, uint8_t>(work);
    case 2:
      return RunTile<uint16_t, uint16_t>(work);
    case 4:
      return RunTile<uint32_t, uint32_t>(work);
    default:
      return RunTile<uint64_t, uint64_t>(work);
  }
}

__global__ void __launch_bounds__(kTileThreads, 4) TileKernel(const BoxArgs args) {
  __shared__ SharedTile shared;
  for (unsigned i = threadIdx.x; i < kDigestBlockWords; i += kTileThreads) {
    shared.weights[i] = kTables.weights[i];
  }
  uint32_t word = kNoWord;
  uint64_t sum = 0;
  for (uint32_t tile = args.first_tile + blockIdx.x; tile < args.end_tile; tile += gridDim.x) {
    const uint32_t index = args.box_of_tile[tile];
    const BoxDesc& box = args.boxes[index];
    if (!Inside(box, args.ranges, args.num_ranges)) {
      if (threadIdx.x == 0) atomicMax(args.report, uint64_t{index} + 1);
      continue;
    }
    if (box.word != word) {
      if (word != kNoWord) FlushWord(sum, args.words + word);
      word = box.word;
      sum = 0;
    }
    const TilePlace place = PlaceOfTile(box, tile - box.first_tile);
    const uint64_t target =
        box.to_size != 0 ? args.ranges[box.to_range].base + box.to_offset + place.to : 0;
    const Work work{box, place,
                    reinterpret_cast<const unsigned char*>(args.ranges[box.from_range].base +
                                                           box.from_offset + place.from),
                    reinterpret_cast<unsigned char*>(target), shared};
    __syncthreads();  // the tile before is done with the shared memory
    sum += RunBoxTile(work);
  }
  if (word != kNoWord) FlushWord(sum, args.words + word);
}

}  // namespace

int LaunchTiles(const BoxArgs& args, int num_blocks, StreamRef stream) {
  TileKernel<<<static_cast<unsigned>(num_blocks), kTileThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace weightd::cuda
