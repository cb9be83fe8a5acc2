#include "daemon/layout/dtype.h"

#include <array>

namespace weightd {
namespace {

struct Entry {
  std::string_view name;
  size_t size_bytes;
};

constexpr std::array<Entry, kNumDTypes> kEntries = {{{"unspecified", 0},
                                                     {"float32", 4},
                                                     {"float16", 2},
                                                     {"bfloat16", 2},
                                                     {"float64", 8},
                                                     {"int8", 1},
                                                     {"uint8", 1},
                                                     {"int16", 2},
                                                     {"int32", 4},
                                                     {"int64", 8},
                                                     {"bool", 1},
                                                     {"float8_e4m3fn", 1},
                                                     {"float8_e5m2", 1}}};

bool IsCastable(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

}  // namespace

size_t SizeBytes(DType dtype) { return kEntries[static_cast<size_t>(dtype)].size_bytes; }

std::string_view Name(DType dtype) { return kEntries[static_cast<size_t>(dtype)].name; }

std::optional<DType> ParseDType(std::string_view name) {
  constexpr std::string_view kTorch = "torch.";
  if (name.substr(0, kTorch.size()) == kTorch) name.remove_prefix(kTorch.size());
  for (size_t i = 1; i < kEntries.size(); ++i) {
    if (kEntries[i].name == name) return static_cast<DType>(i);
  }
  return std::nullopt;
}

bool CanCast(DType from, DType to) {
  if (from == DType::kUnspecified) return false;
  return from == to || (IsCastable(from) && IsCastable(to));
}

}  // namespace weightd
