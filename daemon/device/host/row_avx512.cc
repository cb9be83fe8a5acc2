// Row kernels with AVX-512 (F, BW, VL, DQ); compiled with those flags, reached only where the CPU
// has them. The bfloat16 instructions are not used: they flush denormals.
#include <immintrin.h>

#include "daemon/device/host/row_kernels.h"
#include "daemon/device/host/row_tables.h"

namespace weightd::host {
namespace {

struct Avx512 {
  using Reg = __m512i;
  using Acc = __m512i;
  static constexpr size_t kBytes = 64;

  static Acc Zero() { return _mm512_setzero_si512(); }

  static Acc Mac(Acc acc, Reg reg, const uint32_t* weights) {
    const __m512i even = _mm512_mul_epu32(reg, _mm512_loadu_si512(weights));
    const __m512i odd =
        _mm512_mul_epu32(_mm512_srli_epi64(reg, 32), _mm512_loadu_si512(weights + 1));
    return _mm512_add_epi64(acc, _mm512_add_epi64(even, odd));
  }

  static uint64_t Sum(Acc acc) {
    alignas(64) uint64_t parts[8];
    _mm512_store_si512(parts, acc);
    uint64_t sum = 0;
    for (const uint64_t part : parts) sum += part;
    return sum;
  }

  static Reg Load(const std::byte* from) { return _mm512_loadu_si512(from); }
  static void Store(std::byte* to, Reg reg) { _mm512_storeu_si512(to, reg); }
  static void Stream(std::byte* to, Reg reg) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reg);
  }

  // Sixteen elements as float32, NaNs canonical.
  template <class From>
  static __m512 Widen16(const std::byte* from) {
    __m512 x;
    if constexpr (std::is_same_v<From, F32>) {
      x = _mm512_loadu_ps(from);
    } else {
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      if constexpr (std::is_same_v<From, F16>) {
        x = _mm512_cvtph_ps(half);
      } else {
        x = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      }
    }
    const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(kNanFloat32)));
    return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), nan);
  }

  // Each lane rounded to nearest even in its upper half; the lower half is left over. A canonical
  // NaN stays one.
  static __m512i RoundToBFloat16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i sum = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_add_epi32(sum, odd, sum, _mm512_set1_epi32(1));
  }

  // The upper halves of all lanes of two registers.
  static Reg UpperHalves(__m512i low, __m512i high) {
    alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                        23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                        45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return _mm512_permutex2var_epi16(low, _mm512_load_si512(kUpper), high);
  }

  static Reg Join(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }

  template <class From, class To>
  static Reg Convert(const std::byte* from) {
    if constexpr (std::is_same_v<From, Raw>) {
      return Load(from);
    } else if constexpr (std::is_same_v<To, F32>) {
      return _mm512_castps_si512(Widen16<From>(from));
    } else {
      const __m512 low = Widen16<From>(from);
      const __m512 high = Widen16<From>(from + 16 * sizeof(typename From::Bits));
      if constexpr (std::is_same_v<To, F16>) {
        constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        return Join(_mm512_cvtps_ph(low, kNearest), _mm512_cvtps_ph(high, kNearest));
      } else {
        return UpperHalves(RoundToBFloat16(low), RoundToBFloat16(high));
      }
    }
  }
};

}  // namespace

const RowKernels& Avx512Kernels() {
  static constexpr RowKernels kernels = MakeKernels<Avx512>(Isa::kAvx512);
  return kernels;
}

}  // namespace weightd::host
