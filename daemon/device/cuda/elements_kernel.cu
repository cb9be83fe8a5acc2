// What has no fast form: misaligned or strided on both sides, the elements behind a row's last
// vector, and zeros. Every warp takes tiles by itself.
#include <cuda_runtime.h>

#include "daemon/device/cuda/device_math.cuh"
#include "daemon/device/cuda/kernel_args.h"

namespace weightd::cuda {
namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kVectorBytes = 16;
constexpr uint32_t kNoWord = ~0U;

__device__ const DigestTables kTables = MakeDigestTables();

// A warp's view of a unit.
struct Work {
  const BoxDesc* box;
  const unsigned char* from;  // the unit's first elements
  unsigned char* to;
  uint64_t row;
  uint64_t column;
  uint32_t count;
  uint32_t lane;  // within the unit
};

// Elements [begin + lane, count) in steps of the unit's lanes, one by one; returns their digest.
__device__ __forceinline__ uint64_t RunElements(const Work& work, uint32_t begin) {
  const BoxDesc& box = *work.box;
  const BoxKind kind = box.kind;
  const BoxDim fast = box.dims[0];
  const unsigned size = UnitSize(box);
  uint64_t row_weight = 0;
  if (box.digest && fast.column != 0) {
    row_weight = RowWeightOfKey(box.key, work.row, work.column * size / kDigestBlockBytes);
  }
  uint64_t sum = 0;
  for (uint32_t i = begin + work.lane; i < work.count; i += box.lanes) {
    uint64_t bits = 0;
    if (box.from_size != 0) bits = LoadElement(work.from + i * fast.from, box.from_size);
    bits = CastElement(kind, bits);
    if (box.to_size != 0) StoreElement(work.to + i * fast.to, box.to_size, bits);
    if (kind == BoxKind::kZeroCheck) sum += bits != 0 ? box.key : 0;
    if (!box.digest) continue;
    const uint64_t byte = (work.column + uint64_t{i} * fast.column) * size;
    if (fast.column == 0) {
      row_weight = RowWeightOfKey(box.key, work.row + i * fast.row, byte / kDigestBlockBytes);
    }
    sum += row_weight *
           Term(bits, size, static_cast<unsigned>(byte % kDigestBlockBytes), kTables.weights);
  }
  return sum;
}

__device__ __forceinline__ uint64_t RunUnit(const Work& work) {
  const BoxKind kind = work.box->kind;
  uint32_t begin = 0;
  if (kind == BoxKind::kZero && work.box->vectors) {
    const uint32_t per_vector = kVectorBytes / work.box->to_size;
    const uint32_t num_vectors = work.count / per_vector;
    for (uint32_t v = work.lane; v < num_vectors; v += work.box->lanes) {
      reinterpret_cast<uint4*>(work.to)[v] = uint4{0, 0, 0, 0};
    }
    begin = num_vectors * per_vector;
  }
  // Zero fill also counts its elements.
  const bool counts = (kind == BoxKind::kZero || kind == BoxKind::kZeroCheck) && work.lane == 0;
  return RunElements(work, begin) + (counts ? work.count : 0);
}

__device__ __forceinline__ uint64_t RunTile(const BoxDesc& box, uint32_t tile,
                                            const BoxArgs& args) {
  const unsigned lane = threadIdx.x % kWarp;
  const unsigned lanes = box.lanes;
  const uint64_t from = box.from_size != 0 ? args.ranges[box.from_range].base + box.from_offset : 0;
  const uint64_t to = box.to_size != 0 ? args.ranges[box.to_range].base + box.to_offset : 0;
  const uint32_t begin = (tile - box.first_tile) * box.units_per_tile;
  const uint32_t end = min(box.units, begin + box.units_per_tile);
  uint64_t sum = 0;
  for (uint32_t unit = begin + lane / lanes; unit < end; unit += kWarp / lanes) {
    const UnitPlace place = PlaceOfUnit(box, unit);
    const Work work{&box,
                    reinterpret_cast<const unsigned char*>(from + place.from),
                    reinterpret_cast<unsigned char*>(to + place.to),
                    place.row,
                    place.column,
                    place.count,
                    lane % lanes};
    sum += RunUnit(work);
  }
  return sum;
}

__global__ void __launch_bounds__(kBoxThreads) ElementsKernel(const BoxArgs args) {
  const uint32_t warps = gridDim.x * (kBoxThreads / kWarp);
  const uint32_t warp = blockIdx.x * (kBoxThreads / kWarp) + threadIdx.x / kWarp;
  uint32_t word = kNoWord;
  uint64_t sum = 0;
  for (uint32_t tile = args.first_tile + warp; tile < args.end_tile; tile += warps) {
    const uint32_t index = args.box_of_tile[tile];
    const BoxDesc& box = args.boxes[index];
    if (!Inside(box, args.ranges, args.num_ranges)) {
      if (threadIdx.x % kWarp == 0) atomicMax(args.report, uint64_t{index} + 1);
      continue;
    }
    if (box.word != word) {
      if (word != kNoWord) FlushWord(sum, args.words + word);
      word = box.word;
      sum = 0;
    }
    sum += RunTile(box, tile, args);
  }
  if (word != kNoWord) FlushWord(sum, args.words + word);
}

}  // namespace

int LaunchElements(const BoxArgs& args, int num_blocks, StreamRef stream) {
  ElementsKernel<<<static_cast<unsigned>(num_blocks), kBoxThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace weightd::cuda
