#include "daemon/device/host/cast.h"

#include <cstdlib>
#include <cstring>

#include "daemon/base/failpoint.h"
#include "daemon/base/status.h"
#include "daemon/device/host/row_tables.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace weightd::host {
namespace {

int FloatIndex(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 0;
    case DType::kFloat16:
      return 1;
    case DType::kBFloat16:
      return 2;
    default:
      return -1;
  }
}

Isa FastestIsa() {
  Isa limit = Isa::kAvx512;
  if (const char* wanted = std::getenv("WEIGHTD_HOST_ISA"); wanted != nullptr) {
    for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
      if (Name(isa) == wanted) limit = isa;
    }
  }
  for (const Isa isa : {Isa::kAvx512, Isa::kAvx2}) {
    if (isa <= limit && Supported(isa)) return isa;
  }
  return Isa::kPortable;
}

#if defined(__x86_64__)
// Clang 14's __builtin_cpu_supports does not know this one.
bool HasF16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

#ifdef WEIGHTD_FAILPOINTS
// float32 to bfloat16 by cutting bits off: what a careless cast does.
uint64_t TruncatingCast(const std::byte* src, std::byte* dst, size_t count, const uint32_t* weights,
                        bool) {
  for (size_t i = 0; i < count; ++i) std::memcpy(dst + 2 * i, src + 4 * i + 2, 2);
  return weights == nullptr ? 0 : PortableKernels().digest(dst, 2 * count, weights);
}
#endif

}  // namespace

std::string_view Name(Isa isa) {
  constexpr std::string_view kNames[kNumIsas] = {"portable", "avx2", "avx512"};
  return kNames[static_cast<size_t>(isa)];
}

RowCast RowKernels::Find(DType from, DType to) const {
  if (from == to) return copy;
#ifdef WEIGHTD_FAILPOINTS
  const bool to_bfloat16 = from == DType::kFloat32 && to == DType::kBFloat16;
  if (to_bfloat16 && Mutated("wrong_cast")) return &TruncatingCast;
#endif
  WEIGHTD_CHECK(FloatIndex(from) >= 0 && FloatIndex(to) >= 0);
  return cast[FloatIndex(from)][FloatIndex(to)];
}

bool Supported(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && HasF16c();
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return isa == Isa::kPortable;
}

const RowKernels& KernelsFor(Isa isa) {
  WEIGHTD_CHECK(Supported(isa));
#if defined(__x86_64__)
  if (isa == Isa::kAvx2) return Avx2Kernels();
  if (isa == Isa::kAvx512) return Avx512Kernels();
#endif
  return PortableKernels();
}

const RowKernels& BestKernels() {
  static const RowKernels& kernels = KernelsFor(FastestIsa());
  return kernels;
}

void StoreFence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace weightd::host
