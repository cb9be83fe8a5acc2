// Casts and digest terms on the device. Casts give the bits of daemon/device/host/float_bits.h: the
// hardware's conversions round to nearest even and keep denormals, but their NaN is another one.
#pragma once

#include <cstdint>

#define WEIGHTD_ROLLED _Pragma("unroll 1")

#include "daemon/device/cuda/box_desc.h"
#include "daemon/device/cuda/box_walk.h"
#include "daemon/device/host/float_bits.h"
#include "daemon/layout/digest.h"

namespace weightd::cuda {

// The tables of layout/digest.h. Every kernel has its own copy, which the caches keep.
struct DigestTables {
  alignas(16) uint32_t weights[kDigestBlockWords];
  uint64_t sums[kDigestBlockWords + 1];
};

constexpr DigestTables MakeDigestTables() {
  DigestTables tables{};
  for (int i = 0; i < kDigestBlockWords; ++i) {
    tables.weights[i] = kWordWeights[static_cast<size_t>(i)];
    tables.sums[i] = kWordWeightSums[static_cast<size_t>(i)];
  }
  tables.sums[kDigestBlockWords] = kWordWeightSums[kDigestBlockWords];
  return tables;
}

// ---- two elements in one word -----------------------------------------------------------------

// Both halves at once: the hardware's NaN, 0x7fff, becomes `nan`. No other value has these bits.
__device__ __forceinline__ uint32_t FixNans(uint32_t pair, uint32_t nan) {
  if ((pair & 0x7fffU) == 0x7fffU) pair = (pair & 0xffff0000U) | nan;
  if ((pair & 0x7fff0000U) == 0x7fff0000U) pair = (pair & 0xffffU) | (nan << 16);
  return pair;
}

__device__ __forceinline__ uint32_t FixNan(uint32_t bits, uint32_t nan) {
  return (bits & 0x7fffU) == 0x7fffU ? nan : bits;
}

// Nonzero if a half of the word is the hardware's NaN.
__device__ __forceinline__ uint32_t HasNan(uint32_t pair) {
  return ((pair & 0x7fff7fffU) + 0x00010001U) & 0x80008000U;
}

__device__ __forceinline__ uint32_t PackBFloat16(uint32_t low, uint32_t high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;"
      : "=r"(pair)
      : "f"(__uint_as_float(high)), "f"(__uint_as_float(low)));
  return pair;
}

__device__ __forceinline__ uint32_t PackFloat16(uint32_t low, uint32_t high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;"
      : "=r"(pair)
      : "f"(__uint_as_float(high)), "f"(__uint_as_float(low)));
  return pair;
}

// float32 bits of a half; the NaN's bits may be any NaN's.
__device__ __forceinline__ uint32_t WidenFloat16(uint32_t bits) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(static_cast<uint16_t>(bits)));
  return __float_as_uint(wide);
}

__device__ __forceinline__ uint32_t WidenBFloat16(uint32_t bits) { return bits << 16; }

// ---- one element ------------------------------------------------------------------------------

/// Casts one element of any kind but kZero; copies return `bits`.
__device__ __forceinline__ uint64_t CastElement(BoxKind kind, uint64_t bits) {
  const auto low = static_cast<uint32_t>(bits);
  switch (kind) {
    case BoxKind::kFloat32ToBFloat16:
      return FixNan(PackBFloat16(low, 0), host::kNanBFloat16);
    case BoxKind::kFloat32ToFloat16:
      return FixNan(PackFloat16(low, 0), host::kNanFloat16);
    case BoxKind::kFloat16ToBFloat16:
      return FixNan(PackBFloat16(WidenFloat16(low), 0), host::kNanBFloat16);
    case BoxKind::kBFloat16ToFloat16:
      return FixNan(PackFloat16(WidenBFloat16(low), 0), host::kNanFloat16);
    case BoxKind::kFloat16ToFloat32:
      return host::CanonicalNan32(WidenFloat16(low));
    case BoxKind::kBFloat16ToFloat32:
      return host::CanonicalNan32(WidenBFloat16(low));
    default:
      return bits;
  }
}

template <class T>
__device__ __forceinline__ uint64_t LoadAs(const unsigned char* from) {
  return *reinterpret_cast<const T*>(from);
}

__device__ __forceinline__ uint64_t LoadElement(const unsigned char* from, unsigned size) {
  switch (size) {
    case 1:
      return LoadAs<uint8_t>(from);
    case 2:
      return LoadAs<uint16_t>(from);
    case 4:
      return LoadAs<uint32_t>(from);
    default:
      return LoadAs<uint64_t>(from);
  }
}

__device__ __forceinline__ void StoreElement(unsigned char* to, unsigned size, uint64_t bits) {
  switch (size) {
    case 1:
      *to = static_cast<uint8_t>(bits);
      break;
    case 2:
      *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(bits);
      break;
    case 4:
      *reinterpret_cast<uint32_t*>(to) = static_cast<uint32_t>(bits);
      break;
    default:
      *reinterpret_cast<uint64_t*>(to) = bits;
  }
}

// ---- the digest -------------------------------------------------------------------------------

/// layout/digest.h's ElementTerm with the weights from a table, for elements of any size. `byte` is
/// the element's position in its digest block.
__device__ __forceinline__ uint64_t Term(uint64_t bits, unsigned size, unsigned byte,
                                         const uint32_t* weights) {
  if (size == 8) {
    return (uint64_t{static_cast<uint32_t>(bits)} + kValueMask) * weights[byte / 4] +
           ((bits >> 32) + kValueMask) * weights[byte / 4 + 1];
  }
  const unsigned shift = 8 * (byte % 4);
  const uint32_t keep = size == 4 ? ~0U : (1U << (8 * size)) - 1;
  const uint32_t mask = kValueMask & (keep << shift);
  return ((static_cast<uint64_t>(bits) << shift) + mask) * weights[byte / 4];
}

/// acc + word * weight for all words of a vector; the masks are added once per run.
__device__ __forceinline__ uint64_t MacVector(uint64_t acc, const uint2& words,
                                              const uint2& weights) {
  acc += uint64_t{words.x} * weights.x;
  return acc + uint64_t{words.y} * weights.y;
}

__device__ __forceinline__ uint64_t MacVector(uint64_t acc, const uint4& words,
                                              const uint4& weights) {
  acc = MacVector(acc, uint2{words.x, words.y}, uint2{weights.x, weights.y});
  return MacVector(acc, uint2{words.z, words.w}, uint2{weights.z, weights.w});
}

/// The sum over the lanes, in all of them. All lanes of the warp call it.
__device__ __forceinline__ uint64_t WarpSum(uint64_t sum) {
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffU, sum, step);
  return sum;
}

/// Adds the lanes' sums to a digest word. All lanes of the warp call it.
__device__ __forceinline__ void FlushWord(uint64_t sum, unsigned long long* word) {
  sum = WarpSum(sum);
  if (threadIdx.x % 32 == 0 && sum != 0) atomicAdd(word, static_cast<unsigned long long>(sum));
}

/// Adds the sums of all threads of a block to a digest word: one atomic per call, since blocks work
/// on the same few words at the same time. `warp_sums` is shared memory, one per warp. All threads
/// call it and synchronise before they use warp_sums again.
template <unsigned kThreads>
__device__ __forceinline__ void AddToWord(uint64_t sum, uint64_t* warp_sums,
                                          unsigned long long* word) {
  sum = WarpSum(sum);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = WarpSum(threadIdx.x < kThreads / 32 ? warp_sums[threadIdx.x] : 0);
  if (threadIdx.x == 0) atomicAdd(word, static_cast<unsigned long long>(sum));
}

}  // namespace weightd::cuda
