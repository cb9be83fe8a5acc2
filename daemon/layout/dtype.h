#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace weightd {

/// Element types. Values equal those of weightd.v1.DType and of the C ABI.
enum class DType : uint8_t {
  kUnspecified = 0,
  kFloat32 = 1,
  kFloat16 = 2,
  kBFloat16 = 3,
  kFloat64 = 4,
  kInt8 = 5,
  kUInt8 = 6,
  kInt16 = 7,
  kInt32 = 8,
  kInt64 = 9,
  kBool = 10,
  kFloat8E4M3FN = 11,
  kFloat8E5M2 = 12,
};
inline constexpr int kNumDTypes = 13;

/// Bytes of one element; 0 for kUnspecified.
size_t SizeBytes(DType dtype);

/// torch's name, e.g. "bfloat16".
std::string_view Name(DType dtype);

/// The type with that torch name ("float32", also "torch.float32"); nullopt if there is none.
std::optional<DType> ParseDType(std::string_view name);

/// True if weightd can turn `from` into `to`: equal types (bits are copied), or both of float32,
/// float16, bfloat16 (round to nearest even; a NaN becomes the canonical quiet NaN). Never to or
/// from an 8-bit float of another type.
bool CanCast(DType from, DType to);

}  // namespace weightd
