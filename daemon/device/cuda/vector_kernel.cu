// Boxes that run along the same dimension on both sides, in whole vectors. A block takes a tile;
// its units go to the warps in turn, so that what a block reads at a time lies together.
#include <cuda_runtime.h>

#include "daemon/device/cuda/device_math.cuh"
#include "daemon/device/cuda/kernel_args.h"

namespace weightd::cuda {
namespace {

constexpr unsigned kWarp = 32;

__device__ const DigestTables kTables = MakeDigestTables();

struct SharedTables {
  alignas(16) uint32_t weights[kDigestBlockWords];
  uint64_t sums[kBoxThreads / kWarp];
};

// What a lane moves at a time: at most 16 bytes on either side, so that the lanes of a warp read
// and write without gaps. In: the source's bytes; Out: the target's. kBatch loads are under way per
// lane, kBlocks blocks share a multiprocessor and its registers: both as measured best.
struct CopyOp {
  using In = uint4;
  using Out = uint4;
  static constexpr unsigned kBatch = 4;
  static constexpr unsigned kBlocks = 3;
  static constexpr bool kWrites = true;
  static __device__ __forceinline__ Out Convert(const In& in) { return in; }
};

struct DigestOp : CopyOp {
  static constexpr unsigned kBlocks = 4;
  static constexpr bool kWrites = false;
};

template <bool kBFloat16>
constexpr uint32_t kNan = kBFloat16 ? host::kNanBFloat16 : host::kNanFloat16;

// float32 to a 16-bit type.
template <bool kBFloat16>
struct NarrowOp {
  using In = uint4;
  using Out = uint2;
  static constexpr unsigned kBatch = 8;
  static constexpr unsigned kBlocks = 3;
  static constexpr bool kWrites = true;
  static __device__ __forceinline__ uint32_t Pack(uint32_t low, uint32_t high) {
    return kBFloat16 ? PackBFloat16(low, high) : PackFloat16(low, high);
  }
  static __device__ __forceinline__ Out Convert(const In& in) {
    const Out out{Pack(in.x, in.y), Pack(in.z, in.w)};
    if ((HasNan(out.x) | HasNan(out.y)) == 0) return out;
    return {FixNans(out.x, kNan<kBFloat16>), FixNans(out.y, kNan<kBFloat16>)};
  }
};

// Between the two 16-bit types.
template <bool kToBFloat16>
struct RecodeOp : CopyOp {
  static __device__ __forceinline__ uint32_t Pair(uint32_t pair) {
    const uint32_t out = kToBFloat16
                             ? PackBFloat16(WidenFloat16(pair & 0xffffU), WidenFloat16(pair >> 16))
                             : PackFloat16(pair << 16, pair & 0xffff0000U);
    return FixNans(out, kNan<kToBFloat16>);
  }
  static __device__ __forceinline__ Out Convert(const In& in) {
    return {Pair(in.x), Pair(in.y), Pair(in.z), Pair(in.w)};
  }
};

// A 16-bit type to float32.
template <bool kFromBFloat16>
struct WidenOp {
  using In = uint2;
  using Out = uint4;
  static constexpr unsigned kBatch = 4;
  static constexpr unsigned kBlocks = 3;
  static constexpr bool kWrites = true;
  static __device__ __forceinline__ uint32_t One(uint32_t bits) {
    return host::CanonicalNan32(kFromBFloat16 ? WidenBFloat16(bits) : WidenFloat16(bits));
  }
  static __device__ __forceinline__ Out Convert(const In& in) {
    return {One(in.x & 0xffffU), One(in.x >> 16), One(in.y & 0xffffU), One(in.y >> 16)};
  }
};

// What a thread knows of the unit that it works on.
struct Work {
  const unsigned char* from;  // the unit's first elements
  unsigned char* to;
  const uint32_t* weights;  // of its first word, in shared memory
  uint32_t vectors;
  uint32_t lane;  // within the unit
  uint32_t lanes;
};

// Moves a unit's vectors; returns this lane's part of the digest before the row weight. kLanes: the
// unit's lanes where they are known, so that distances are constants; else 0.
template <class Op, uint32_t kLanes>
__device__ __forceinline__ uint64_t RunVectors(Work work, bool digest) {
  using In = typename Op::In;
  using Out = typename Op::Out;
  const uint32_t lanes = kLanes != 0 ? kLanes : work.lanes;
  const In* from = reinterpret_cast<const In*>(work.from) + work.lane;
  Out* to = reinterpret_cast<Out*>(work.to) + work.lane;
  const Out* weights = reinterpret_cast<const Out*>(work.weights) + work.lane;
  uint64_t acc = 0;
#pragma unroll 1
  for (uint32_t v = work.lane; v < work.vectors; v += lanes * Op::kBatch) {
    In in[Op::kBatch];
#pragma unroll
    for (unsigned j = 0; j < Op::kBatch; ++j) {
      if (v + j * lanes < work.vectors) in[j] = from[j * lanes];
    }
#pragma unroll
    for (unsigned j = 0; j < Op::kBatch; ++j) {
      asm volatile("" ::: "memory");  // one vector after the other, or registers run out
      if (v + j * lanes >= work.vectors) continue;
      const Out out = Op::Convert(in[j]);
      if (Op::kWrites) to[j * lanes] = out;
      if (digest) acc = MacVector(acc, out, weights[j * lanes]);
    }
    from += lanes * Op::kBatch;
    to += lanes * Op::kBatch;
    weights += lanes * Op::kBatch;
  }
  return acc;
}

template <class Op>
__device__ __forceinline__ uint64_t RunUnit(const BoxDesc& box, uint64_t from, uint64_t to,
                                            uint32_t unit, const uint32_t* weights) {
  const UnitPlace place = PlaceOfUnit(box, unit);
  const unsigned size = UnitSize(box);
  const uint64_t byte = place.column * size;
  const bool digest = box.digest;
  const uint32_t first_word = digest ? static_cast<uint32_t>(byte % kDigestBlockBytes) / 4 : 0;
  const uint32_t lanes = box.lanes;
  const Work work{reinterpret_cast<const unsigned char*>(from + place.from),
                  reinterpret_cast<unsigned char*>(to + place.to),
                  weights + first_word,
                  place.count * size / static_cast<uint32_t>(sizeof(typename Op::Out)),
                  threadIdx.x % lanes,
                  lanes};
  uint64_t acc =
      lanes == kWarp ? RunVectors<Op, kWarp>(work, digest) : RunVectors<Op, 0>(work, digest);
  if (!digest) return 0;
  if (work.lane == 0) {  // the masks of all words
    const uint64_t* sums = kTables.sums + first_word;
    acc += kValueMask * (sums[place.count * size / 4] - sums[0]);
  }
  return acc * RowWeightOfKey(box.key, place.row, byte / kDigestBlockBytes);
}

template <class Op>
__global__ void __launch_bounds__(kBoxThreads, Op::kBlocks) VectorKernel(const BoxArgs args) {
  __shared__ SharedTables shared;
  for (unsigned i = threadIdx.x; i < kDigestBlockWords; i += kBoxThreads) {
    shared.weights[i] = kTables.weights[i];
  }
  __syncthreads();
  for (uint32_t tile = args.first_tile + blockIdx.x; tile < args.end_tile; tile += gridDim.x) {
    const uint32_t index = args.box_of_tile[tile];
    const BoxDesc& box = args.boxes[index];
    if (!Inside(box, args.ranges, args.num_ranges)) {
      if (threadIdx.x == 0) atomicMax(args.report, uint64_t{index} + 1);
      continue;
    }
    const uint64_t from =
        box.from_size != 0 ? args.ranges[box.from_range].base + box.from_offset : 0;
    const uint64_t to = box.to_size != 0 ? args.ranges[box.to_range].base + box.to_offset : 0;
    const uint32_t begin = (tile - box.first_tile) * box.units_per_tile;
    const uint32_t end = min(box.units, begin + box.units_per_tile);
    const uint32_t step = kBoxThreads / box.lanes;
    uint64_t sum = 0;
#pragma unroll 1
    for (uint32_t unit = begin + threadIdx.x / box.lanes; unit < end; unit += step) {
      sum += RunUnit<Op>(box, from, to, unit, shared.weights);
    }
    if (!box.digest) continue;
    AddToWord<kBoxThreads>(sum, shared.sums, args.words + box.word);
    __syncthreads();
  }
}

template <class Op>
void Start(const BoxArgs& args, int num_blocks, StreamRef stream) {
  VectorKernel<Op><<<static_cast<unsigned>(num_blocks), kBoxThreads, 0, stream>>>(args);
}

}  // namespace

int LaunchVectors(BoxKind kind, const BoxArgs& args, int num_blocks, StreamRef stream) {
  switch (kind) {
    case BoxKind::kCopy:
      Start<CopyOp>(args, num_blocks, stream);
      break;
    case BoxKind::kFloat32ToBFloat16:
      Start<NarrowOp<true>>(args, num_blocks, stream);
      break;
    case BoxKind::kFloat32ToFloat16:
      Start<NarrowOp<false>>(args, num_blocks, stream);
      break;
    case BoxKind::kFloat16ToBFloat16:
      Start<RecodeOp<true>>(args, num_blocks, stream);
      break;
    case BoxKind::kBFloat16ToFloat16:
      Start<RecodeOp<false>>(args, num_blocks, stream);
      break;
    case BoxKind::kFloat16ToFloat32:
      Start<WidenOp<false>>(args, num_blocks, stream);
      break;
    case BoxKind::kBFloat16ToFloat32:
      Start<WidenOp<true>>(args, num_blocks, stream);
      break;
    case BoxKind::kDigest:
      Start<DigestOp>(args, num_blocks, stream);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace weightd::cuda
