// Row kernels with AVX2 and F16C; compiled with those flags, reached only where the CPU has them.
#include <immintrin.h>

#include "daemon/device/host/row_kernels.h"
#include "daemon/device/host/row_tables.h"

namespace weightd::host {
namespace {

struct Avx2 {
  using Reg = __m256i;
  using Acc = __m256i;
  static constexpr size_t kBytes = 32;

  static Acc Zero() { return _mm256_setzero_si256(); }

  static Acc Mac(Acc acc, Reg reg, const uint32_t* weights) {
    const auto load = [](const uint32_t* from) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    };
    const __m256i even = _mm256_mul_epu32(reg, load(weights));
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(reg, 32), load(weights + 1));
    return _mm256_add_epi64(acc, _mm256_add_epi64(even, odd));
  }

  static uint64_t Sum(Acc acc) {
    alignas(32) uint64_t parts[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(parts), acc);
    return parts[0] + parts[1] + parts[2] + parts[3];
  }

  static Reg Load(const std::byte* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static void Store(std::byte* to, Reg reg) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reg);
  }
  static void Stream(std::byte* to, Reg reg) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reg);
  }

  // Eight elements as float32, NaNs canonical.
  template <class From>
  static __m256 Widen8(const std::byte* from) {
    __m256 x;
    if constexpr (std::is_same_v<From, F32>) {
      x = _mm256_loadu_ps(reinterpret_cast<const float*>(from));
    } else {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      if constexpr (std::is_same_v<From, F16>) {
        x = _mm256_cvtph_ps(half);
      } else {
        x = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
      }
    }
    const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(kNanFloat32)));
    return _mm256_blendv_ps(x, nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  }

  // The upper half of each lane, rounded to nearest even. A canonical NaN stays one.
  static __m256i RoundToBFloat16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
    return _mm256_srli_epi32(sum, 16);
  }

  template <class From, class To>
  static Reg Convert(const std::byte* from) {
    if constexpr (std::is_same_v<From, Raw>) {
      return Load(from);
    } else if constexpr (std::is_same_v<To, F32>) {
      return _mm256_castps_si256(Widen8<From>(from));
    } else {
      const __m256 low = Widen8<From>(from);
      const __m256 high = Widen8<From>(from + 8 * sizeof(typename From::Bits));
      if constexpr (std::is_same_v<To, F16>) {
        constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        return _mm256_set_m128i(_mm256_cvtps_ph(high, kNearest), _mm256_cvtps_ph(low, kNearest));
      } else {
        const __m256i packed = _mm256_packus_epi32(RoundToBFloat16(low), RoundToBFloat16(high));
        return _mm256_permute4x64_epi64(packed, 0xd8);
      }
    }
  }
};

}  // namespace

const RowKernels& Avx2Kernels() {
  static constexpr RowKernels kernels = MakeKernels<Avx2>(Isa::kAvx2);
  return kernels;
}

}  // namespace weightd::host
