// Rows of contiguous elements: cast, copy and digest, in the fastest form that this CPU has.
//
// All forms give the same bytes and the same digests: round to nearest even as torch, denormals
// kept, a NaN that is cast becomes 0x7fc00000 / 0x7e00 / 0x7fc0, copies without a cast keep every
// bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "daemon/layout/dtype.h"

namespace weightd::host {

/// Instruction sets that the kernels exist for.
enum class Isa : uint8_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };
inline constexpr int kNumIsas = 3;

/// "portable", "avx2" or "avx512".
std::string_view Name(Isa isa);

/// Casts (or copies) `count` elements. With `weights` also returns the sum of word * weight over
/// the destination's 32-bit words, masks included (layout/digest.h); a last partial word counts the
/// bits it has. `weights` points into kWordWeights, to the word that the first element starts;
/// nullptr: returns 0.
/// `stream`: write around the caches where alignment allows; the caller issues StoreFence() before
/// others may read. \pre src and dst do not overlap; no alignment needed
using RowCast = uint64_t (*)(const std::byte* src, std::byte* dst, size_t count,
                             const uint32_t* weights, bool stream);

/// The same sum over `size_bytes` bytes of memory, nothing written.
using RowDigest = uint64_t (*)(const std::byte* data, size_t size_bytes, const uint32_t* weights);

/// One instruction set's kernels.
struct RowKernels {
  Isa isa = Isa::kPortable;
  /// [from][to] over float32, float16, bfloat16; the diagonal is unused.
  RowCast cast[3][3] = {};
  /// Copies without a cast; counts bytes.
  RowCast copy = nullptr;
  RowDigest digest = nullptr;

  /// The kernel from one dtype to another: `copy`, whose count is in bytes, if they are equal.
  /// \pre CanCast(from, to)
  RowCast Find(DType from, DType to) const;
};

/// True if this CPU and build can run `isa`.
bool Supported(Isa isa);

/// The kernels of `isa`. \pre Supported(isa)
const RowKernels& KernelsFor(Isa isa);

/// The fastest kernels of this CPU. WEIGHTD_HOST_ISA=portable|avx2|avx512 lowers the choice.
const RowKernels& BestKernels();

/// Makes streaming stores of this thread visible before what follows.
void StoreFence();

}  // namespace weightd::host
