// The row loops, written once over a vector type. Included by one file per instruction set, each
// compiled with its own flags; everything lands in that file's unnamed namespace.
//
// An instruction set `V` offers
//   Reg                    a vector register, kBytes bytes of destination words
//   Acc                    an accumulator of 64-bit sums
//   Convert<From, To>(p)   kBytes / sizeof(To) elements at p, cast
//   Zero(), Mac(acc, reg, weights), Sum(acc), Load(p), Store(p, reg), Stream(p, reg)
// Mac adds word * weight and may read one weight past the last.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "daemon/device/host/cast.h"
#include "daemon/device/host/float_bits.h"
#include "daemon/layout/digest.h"

namespace weightd::host {
namespace {

// Elements on bits. Raw counts bytes and is never cast.
struct F32 {
  using Bits = uint32_t;
};
struct F16 {
  using Bits = uint16_t;
};
struct BF16 {
  using Bits = uint16_t;
};
struct Raw {
  using Bits = uint8_t;
};

template <class T>
WEIGHTD_ALWAYS_INLINE T LoadBits(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

WEIGHTD_ALWAYS_INLINE uint32_t Widen(F32, uint32_t bits) { return bits; }
WEIGHTD_ALWAYS_INLINE uint32_t Widen(F16, uint16_t bits) { return Float32FromFloat16(bits); }
WEIGHTD_ALWAYS_INLINE uint32_t Widen(BF16, uint16_t bits) { return Float32FromBFloat16(bits); }
WEIGHTD_ALWAYS_INLINE uint32_t Narrow(F32, uint32_t bits) { return CanonicalNan32(bits); }
WEIGHTD_ALWAYS_INLINE uint16_t Narrow(F16, uint32_t bits) { return Float16FromFloat32(bits); }
WEIGHTD_ALWAYS_INLINE uint16_t Narrow(BF16, uint32_t bits) { return BFloat16FromFloat32(bits); }

template <class From, class To>
WEIGHTD_ALWAYS_INLINE typename To::Bits CastOne(const std::byte* from) {
  if constexpr (std::is_same_v<From, Raw>) {
    return LoadBits<uint8_t>(from);
  } else {
    return Narrow(To{}, Widen(From{}, LoadBits<typename From::Bits>(from)));
  }
}

// The term of one element at byte position `byte` of the weights.
template <class Bits>
WEIGHTD_ALWAYS_INLINE uint64_t Term(Bits bits, size_t byte, const uint32_t* weights) {
  const unsigned shift = 8 * static_cast<unsigned>(byte % 4);
  const uint32_t mask = kValueMask & (static_cast<uint32_t>(static_cast<Bits>(~Bits{0})) << shift);
  return (uint64_t{static_cast<uint32_t>(bits) << shift} + mask) * weights[byte / 4];
}

// What the masks of the words [begin, end) add: the vector loops leave them out.
WEIGHTD_ALWAYS_INLINE uint64_t MaskTerm(const uint32_t* weights, size_t begin, size_t end) {
  const uint64_t* sums = kWordWeightSums.data() + (weights - kWordWeights.data());
  return kValueMask * (sums[end] - sums[begin]);
}

// Elements [begin, end), one by one.
template <class From, class To, bool kDigest>
WEIGHTD_ALWAYS_INLINE uint64_t CastScalar(const std::byte* src, std::byte* dst, size_t begin,
                                          size_t end, const uint32_t* weights) {
  using Bits = typename To::Bits;
  uint64_t sum = 0;
  for (size_t i = begin; i < end; ++i) {
    const Bits bits = CastOne<From, To>(src + i * sizeof(typename From::Bits));
    std::memcpy(dst + i * sizeof(Bits), &bits, sizeof(Bits));
    if constexpr (kDigest) sum += Term(bits, i * sizeof(Bits), weights);
  }
  return sum;
}

// Whole vectors from `begin` on; returns the first element that is left.
template <class V, class From, class To, bool kDigest, bool kStream>
WEIGHTD_ALWAYS_INLINE size_t CastVectors(const std::byte* src, std::byte* dst, size_t begin,
                                         size_t end, const uint32_t* weights, uint64_t& sum) {
  constexpr size_t kStep = V::kBytes / sizeof(typename To::Bits);
  auto acc = V::Zero();
  size_t i = begin;
  for (; i + kStep <= end; i += kStep) {
    const auto reg = V::template Convert<From, To>(src + i * sizeof(typename From::Bits));
    if constexpr (kDigest) acc = V::Mac(acc, reg, weights + i * sizeof(typename To::Bits) / 4);
    std::byte* to = dst + i * sizeof(typename To::Bits);
    if constexpr (kStream) {
      V::Stream(to, reg);
    } else {
      V::Store(to, reg);
    }
  }
  if constexpr (kDigest) {
    constexpr size_t kSize = sizeof(typename To::Bits);
    sum += V::Sum(acc) + MaskTerm(weights, begin * kSize / 4, i * kSize / 4);
  }
  return i;
}

template <class V, class From, class To, bool kDigest>
uint64_t CastRow(const std::byte* src, std::byte* dst, size_t count, const uint32_t* weights,
                 bool stream) {
  constexpr size_t kSize = sizeof(typename To::Bits);
  uint64_t sum = 0;
  size_t done = 0;
  // Streaming stores need whole aligned vectors; the digest needs whole words.
  const size_t lead = (V::kBytes - reinterpret_cast<uintptr_t>(dst) % V::kBytes) % V::kBytes;
  if (stream && lead % 4 == 0 && lead / kSize < count) {
    done = lead / kSize;
    sum += CastScalar<From, To, kDigest>(src, dst, 0, done, weights);
    done = CastVectors<V, From, To, kDigest, true>(src, dst, done, count, weights, sum);
  } else {
    done = CastVectors<V, From, To, kDigest, false>(src, dst, 0, count, weights, sum);
  }
  return sum + CastScalar<From, To, kDigest>(src, dst, done, count, weights);
}

template <class V, class From, class To>
uint64_t Cast(const std::byte* src, std::byte* dst, size_t count, const uint32_t* weights,
              bool stream) {
  if (weights == nullptr) return CastRow<V, From, To, false>(src, dst, count, weights, stream);
  return CastRow<V, From, To, true>(src, dst, count, weights, stream);
}

template <class V>
uint64_t Digest(const std::byte* data, size_t size_bytes, const uint32_t* weights) {
  auto even = V::Zero();
  auto odd = V::Zero();
  size_t i = 0;
  for (; i + 2 * V::kBytes <= size_bytes; i += 2 * V::kBytes) {
    even = V::Mac(even, V::Load(data + i), weights + i / 4);
    odd = V::Mac(odd, V::Load(data + i + V::kBytes), weights + (i + V::kBytes) / 4);
  }
  uint64_t sum = V::Sum(even) + V::Sum(odd) + MaskTerm(weights, 0, i / 4);
  for (; i + 4 <= size_bytes; i += 4) sum += Term(LoadBits<uint32_t>(data + i), i, weights);
  for (; i < size_bytes; ++i) sum += Term(LoadBits<uint8_t>(data + i), i, weights);
  return sum;
}

template <class V>
constexpr RowKernels MakeKernels(Isa isa) {
  RowKernels kernels;
  kernels.isa = isa;
  kernels.cast[0][1] = &Cast<V, F32, F16>;
  kernels.cast[0][2] = &Cast<V, F32, BF16>;
  kernels.cast[1][0] = &Cast<V, F16, F32>;
  kernels.cast[1][2] = &Cast<V, F16, BF16>;
  kernels.cast[2][0] = &Cast<V, BF16, F32>;
  kernels.cast[2][1] = &Cast<V, BF16, F16>;
  kernels.copy = &Cast<V, Raw, Raw>;
  kernels.digest = &Digest<V>;
  return kernels;
}

}  // namespace
}  // namespace weightd::host
