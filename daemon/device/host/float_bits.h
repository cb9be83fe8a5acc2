// Casts of one element, on bits: round to nearest even, denormals kept, a NaN becomes the canonical
// quiet NaN. The reference for the vector kernels, and their tails.
//
// Everything here is forced inline: it is compiled into files with different instruction sets, and
// an out-of-line copy of the wrong one must not be shared.
#pragma once

#include <cstdint>

#define WEIGHTD_ALWAYS_INLINE [[gnu::always_inline]] inline

namespace weightd::host {

inline constexpr uint32_t kNanFloat32 = 0x7fc00000U;
inline constexpr uint16_t kNanFloat16 = 0x7e00U;
inline constexpr uint16_t kNanBFloat16 = 0x7fc0U;

WEIGHTD_ALWAYS_INLINE constexpr bool IsNan32(uint32_t bits) {
  return (bits & 0x7fffffffU) > 0x7f800000U;
}

WEIGHTD_ALWAYS_INLINE constexpr uint32_t CanonicalNan32(uint32_t bits) {
  return IsNan32(bits) ? kNanFloat32 : bits;
}

WEIGHTD_ALWAYS_INLINE constexpr uint16_t BFloat16FromFloat32(uint32_t bits) {
  if (IsNan32(bits)) return kNanBFloat16;
  return static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

WEIGHTD_ALWAYS_INLINE constexpr uint32_t Float32FromBFloat16(uint16_t bits) {
  return CanonicalNan32(uint32_t{bits} << 16);
}

WEIGHTD_ALWAYS_INLINE constexpr uint16_t Float16FromFloat32(uint32_t bits) {
  const uint32_t sign = (bits >> 16) & 0x8000U;
  const uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > 0x7f800000U) return kNanFloat16;
  // 65520 and above round to infinity.
  if (magnitude >= 0x477ff000U) return static_cast<uint16_t>(sign | 0x7c00U);
  if (magnitude >= 0x38800000U) {  // normal: rebias the exponent by 127 - 15 and round 13 bits off
    const uint32_t rebiased = magnitude - (112U << 23);
    return static_cast<uint16_t>(sign | ((rebiased + 0xfffU + ((rebiased >> 13) & 1U)) >> 13));
  }
  if (magnitude <= 0x33000000U) return static_cast<uint16_t>(sign);  // at most half the smallest
  // Denormal: the value is significand * 2^(exponent - 150), the unit is 2^-24.
  const uint32_t shift = 126U - (magnitude >> 23);
  const uint32_t significand = (magnitude & 0x7fffffU) | 0x800000U;
  const uint32_t half = 1U << (shift - 1);
  const uint32_t kept = significand >> shift;
  const uint32_t rest = significand & ((1U << shift) - 1);
  const uint32_t up = (rest > half || (rest == half && (kept & 1U) != 0)) ? 1U : 0U;
  return static_cast<uint16_t>(sign | (kept + up));
}

WEIGHTD_ALWAYS_INLINE constexpr uint32_t Float32FromFloat16(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000U} << 16;
  uint32_t exponent = (bits >> 10) & 0x1fU;
  uint32_t significand = bits & 0x3ffU;
  if (exponent == 0x1fU) return significand != 0 ? kNanFloat32 : (sign | 0x7f800000U);
  if (exponent == 0) {
    if (significand == 0) return sign;
    exponent = 1;
    while ((significand & 0x400U) == 0) {
      significand <<= 1;
      --exponent;  // wraps below zero; the sum below wraps back
    }
    significand &= 0x3ffU;
  }
  return sign | ((exponent + 112U) << 23) | (significand << 13);
}

}  // namespace weightd::host
