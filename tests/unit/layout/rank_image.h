// What a rank's parameters would hold after a sync, element by element.
#pragma once

#include <cstdint>
#include <vector>

#include "daemon/layout/tensor_layout.h"

namespace weightd::test {

inline constexpr int64_t kZero = -1;     ///< zero fill
inline constexpr int64_t kUnset = -2;    ///< written by nothing
inline constexpr int64_t kTwice = -3;    ///< written more than once
inline constexpr int64_t kOutside = -4;  ///< a write reached beyond a tensor

/// The value of element `offset` of tensor `tensor`: unique.
inline int64_t Element(int64_t tensor, int64_t offset) { return tensor * 1'000'000'000 + offset; }

/// Applies one write by walking its target elements, no matter how the library would do it.
inline void Apply(const Write& write, const Shape& param, const TensorTable& table,
                  std::vector<int64_t>* image) {
  const int dims = param.size();
  const int64_t count = write.target.num_elements();
  for (int64_t flat = 0; flat < count; ++flat) {
    int64_t rest = flat;
    int64_t target = 0;
    int64_t stride = 1;
    std::vector<int64_t> source_at(write.source.origin.begin(), write.source.origin.end());
    bool inside = true;
    for (int dim = dims - 1; dim >= 0; --dim) {
      const int64_t at = rest % write.target.extent[dim];
      rest /= write.target.extent[dim];
      target += (write.target.origin[dim] + at) * stride;
      inside = inside && write.target.origin[dim] + at < param[dim];
      stride *= param[dim];
      const int from = write.source_dim[static_cast<size_t>(dim)];
      if (!write.zero_fill && from >= 0) source_at[static_cast<size_t>(from)] += at;
    }
    int64_t value = kZero;
    if (!write.zero_fill) {
      const Shape& shape = table[write.tensor].shape;
      int64_t offset = 0;
      for (int dim = 0; dim < shape.size(); ++dim) {
        const int64_t at = source_at[static_cast<size_t>(dim)];
        inside = inside && at >= 0 && at < shape[dim];
        offset = offset * shape[dim] + at;
      }
      value = Element(write.tensor, offset);
    }
    if (target < 0 || target >= static_cast<int64_t>(image->size())) continue;
    int64_t& element = (*image)[static_cast<size_t>(target)];
    element = !inside ? kOutside : element == kUnset ? value : kTwice;
  }
}

/// One vector per parameter, row-major.
inline std::vector<std::vector<int64_t>> ImageOf(const RankLayout& layout,
                                                 const TensorTable& table) {
  std::vector<std::vector<int64_t>> images;
  for (const ParamInfo& param : layout.params) {
    images.emplace_back(static_cast<size_t>(NumElements(param.shape)), kUnset);
  }
  for (const Write& write : layout.writes) {
    Apply(write, layout.params[write.param].shape, table, &images[write.param]);
  }
  return images;
}

}  // namespace weightd::test
