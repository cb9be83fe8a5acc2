// Boxes that run along the same dimension on both sides: every warp takes tiles of units by itself.
#include <cuda_runtime.h>

#include "daemon/device/cuda/box_walk.h"
#include "daemon/device/cuda/device_math.cuh"
#include "daemon/device/cuda/kernel_args.h"

namespace weightd::cuda {
namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kVectorBytes = 16;
constexpr uint32_t kNoWord = ~0U;

__device__ const DigestTables kTables = MakeDigestTables();

struct SharedTables {
  alignas(16) uint32_t weights[kDigestBlockWords];
  uint64_t sums[kDigestBlockWords + 1];
};

__device__ void FillTables(SharedTables& shared) {
  for (unsigned i = threadIdx.x; i < kDigestBlockWords; i += blockDim.x) {
    shared.weights[i] = kTables.weights[i];
    shared.sums[i] = kTables.sums[i];
  }
  if (threadIdx.x == 0) shared.sums[kDigestBlockWords] = kTables.sums[kDigestBlockWords];
  __syncthreads();
}

// Bytes are read once and written once, so they are kept out of the caches where that is possible.
__device__ __forceinline__ uint4 LoadVector(const unsigned char* from) {
  return __ldcs(reinterpret_cast<const uint4*>(from));
}

// How one 16-byte vector of the target is made. kFromBytes: what it takes of the source.
struct CopyOp {
  static constexpr unsigned kFromBytes = 16;
  static constexpr unsigned kBatch = 4;
  static constexpr bool kWrites = true;
  struct In {
    uint4 a;
  };
  static __device__ __forceinline__ In Load(const unsigned char* from) {
    return {LoadVector(from)};
  }
  static __device__ __forceinline__ uint4 Convert(const In& in) { return in.a; }
};

struct DigestOp : CopyOp {
  static constexpr unsigned kBatch = 8;
  static constexpr bool kWrites = false;
};

template <uint32_t kNan>
__device__ __forceinline__ uint4 Canonical(uint4 out) {
  if ((HasNan(out.x) | HasNan(out.y) | HasNan(out.z) | HasNan(out.w)) != 0) {
    out = {FixNans(out.x, kNan), FixNans(out.y, kNan), FixNans(out.z, kNan), FixNans(out.w, kNan)};
  }
  return out;
}

template <bool kBFloat16>
struct NarrowOp {
  static constexpr unsigned kFromBytes = 32;
  static constexpr unsigned kBatch = 4;
  static constexpr bool kWrites = true;
  struct In {
    uint4 a, b;
  };
  static __device__ __forceinline__ In Load(const unsigned char* from) {
    return {LoadVector(from), LoadVector(from + 16)};
  }
  static __device__ __forceinline__ uint32_t Pack(uint32_t low, uint32_t high) {
    return kBFloat16 ? PackBFloat16(low, high) : PackFloat16(low, high);
  }
  static __device__ __forceinline__ uint4 Convert(const In& in) {
    return Canonical < kBFloat16
               ? host::kNanBFloat16
               : host::kNanFloat16 > ({Pack(in.a.x, in.a.y), Pack(in.a.z, in.a.w),
                                       Pack(in.b.x, in.b.y), Pack(in.b.z, in.b.w)});
  }
};

// Between the two 16-bit types.
template <bool kToBFloat16>
struct RecodeOp : CopyOp {
  static __device__ __forceinline__ uint32_t Pair(uint32_t pair) {
    if constexpr (kToBFloat16)
      return PackBFloat16(WidenFloat16(pair & 0xffffU), WidenFloat16(pair >> 16));
    return PackFloat16(pair << 16, pair & 0xffff0000U);
  }
  static __device__ __forceinline__ uint4 Convert(const In& in) {
    return Canonical < kToBFloat16
               ? host::kNanBFloat16
               : host::kNanFloat16 > ({Pair(in.a.x), Pair(in.a.y), Pair(in.a.z), Pair(in.a.w)});
  }
};

template <bool kFromBFloat16>
struct WidenOp {
  static constexpr unsigned kFromBytes = 8;
  static constexpr unsigned kBatch = 8;
  static constexpr bool kWrites = true;
  struct In {
    uint2 a;
  };
  static __device__ __forceinline__ In Load(const unsigned char* from) {
    return {__ldcs(reinterpret_cast<const uint2*>(from))};
  }
  static __device__ __forceinline__ uint32_t One(uint32_t bits) {
    return host::CanonicalNan32(kFromBFloat16 ? WidenBFloat16(bits) : WidenFloat16(bits));
  }
  static __device__ __forceinline__ uint4 Convert(const In& in) {
    return {One(in.a.x & 0xffffU), One(in.a.x >> 16), One(in.a.y & 0xffffU), One(in.a.y >> 16)};
  }
};

// A warp's view of a unit.
struct Work {
  const BoxDesc* box;
  const unsigned char* from;  // the unit's first elements
  unsigned char* to;
  const SharedTables* tables;
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
           Term(bits, size, static_cast<unsigned>(byte % kDigestBlockBytes), work.tables->weights);
  }
  return sum;
}

// The whole vectors of a unit; returns their digest before the row weight. kLanes: the unit's lanes
// where they are known, so that distances are constants; else 0.
template <class Op, uint32_t kLanes>
__device__ __forceinline__ uint64_t RunVectors(const Work& work, uint32_t num_vectors,
                                               const uint32_t* weights, bool digest) {
  const uint32_t lanes = kLanes != 0 ? kLanes : work.box->lanes;
  const unsigned char* from = work.from + work.lane * Op::kFromBytes;
  unsigned char* to = work.to + work.lane * kVectorBytes;
  weights += work.lane * (kVectorBytes / 4);
  uint64_t acc = 0;
  for (uint32_t v = work.lane; v < num_vectors; v += lanes * Op::kBatch) {
    typename Op::In in[Op::kBatch];
#pragma unroll
    for (unsigned j = 0; j < Op::kBatch; ++j) {
      if (v + j * lanes < num_vectors) in[j] = Op::Load(from + j * lanes * Op::kFromBytes);
    }
#pragma unroll
    for (unsigned j = 0; j < Op::kBatch; ++j) {
      if (v + j * lanes >= num_vectors) continue;
      const uint4 out = Op::Convert(in[j]);
      if (Op::kWrites) __stcs(reinterpret_cast<uint4*>(to + j * lanes * kVectorBytes), out);
      if (digest) {
        acc = MacVector(acc, out,
                        *reinterpret_cast<const uint4*>(weights + j * lanes * (kVectorBytes / 4)));
      }
    }
    from += lanes * Op::kBatch * Op::kFromBytes;
    to += lanes * Op::kBatch * kVectorBytes;
    weights += lanes * Op::kBatch * (kVectorBytes / 4);
  }
  return acc;
}

template <class Op>
__device__ __forceinline__ uint64_t RunUnit(const Work& work) {
  const BoxDesc& box = *work.box;
  const unsigned size = UnitSize(box);
  const uint32_t num_vectors = work.count * size / kVectorBytes;
  const bool digest = box.digest;
  const uint64_t byte = work.column * size;
  const uint32_t first_word = digest ? static_cast<uint32_t>(byte % kDigestBlockBytes) / 4 : 0;
  const uint32_t* weights = work.tables->weights + first_word;
  uint64_t acc = box.lanes == kWarp ? RunVectors<Op, kWarp>(work, num_vectors, weights, digest)
                                    : RunVectors<Op, 0>(work, num_vectors, weights, digest);
  if (!digest) return 0;
  if (work.lane == 0) {
    const uint64_t* sums = work.tables->sums + first_word;
    acc += kValueMask * (sums[4 * num_vectors] - sums[0]);
  }
  return acc * RowWeightOfKey(box.key, work.row, byte / kDigestBlockBytes);
}

// Not an Op of vectors: everything that has no fast form.
struct ElementsOp {};

template <>
__device__ __forceinline__ uint64_t RunUnit<ElementsOp>(const Work& work) {
  const BoxKind kind = work.box->kind;
  uint32_t begin = 0;
  if (kind == BoxKind::kZero && work.box->vectors) {
    const uint32_t per_vector = kVectorBytes / work.box->to_size;
    const uint32_t num_vectors = work.count / per_vector;
    for (uint32_t v = work.lane; v < num_vectors; v += work.box->lanes) {
      __stcs(reinterpret_cast<uint4*>(work.to + v * kVectorBytes), uint4{0, 0, 0, 0});
    }
    begin = num_vectors * per_vector;
  }
  // Zero fill also counts its elements.
  const bool counts = (kind == BoxKind::kZero || kind == BoxKind::kZeroCheck) && work.lane == 0;
  return RunElements(work, begin) + (counts ? work.count : 0);
}

template <class Op>
__device__ __forceinline__ uint64_t RunTile(const BoxDesc& box, uint32_t tile, const BoxArgs& args,
                                            const SharedTables& tables) {
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
                    &tables,
                    place.row,
                    place.column,
                    place.count,
                    lane % lanes};
    sum += RunUnit<Op>(work);
  }
  return sum;
}

template <class Op>
__global__ void __launch_bounds__(kRowThreads, 2) RowKernel(const BoxArgs args) {
  __shared__ SharedTables tables;
  FillTables(tables);
  const uint32_t warps = gridDim.x * (kRowThreads / kWarp);
  const uint32_t warp = blockIdx.x * (kRowThreads / kWarp) + threadIdx.x / kWarp;
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
    sum += RunTile<Op>(box, tile, args, tables);
  }
  if (word != kNoWord) FlushWord(sum, args.words + word);
}

template <class Op>
void Start(const BoxArgs& args, int num_blocks, StreamRef stream) {
  RowKernel<Op><<<static_cast<unsigned>(num_blocks), kRowThreads, 0, stream>>>(args);
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

int LaunchElements(const BoxArgs& args, int num_blocks, StreamRef stream) {
  Start<ElementsOp>(args, num_blocks, stream);
  return cudaGetLastError();
}

}  // namespace weightd::cuda
