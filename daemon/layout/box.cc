#include "daemon/layout/box.h"

#include <fmt/format.h>

#include <algorithm>

#include "daemon/base/status.h"

namespace weightd {

Dims::Dims(std::initializer_list<int64_t> values)
    : Dims(std::span<const int64_t>(values.begin(), values.size())) {}

Dims::Dims(std::span<const int64_t> values) : size_(static_cast<int8_t>(values.size())) {
  WEIGHTD_CHECK(values.size() <= kMaxDims);
  std::copy(values.begin(), values.end(), values_.begin());
}

Dims Dims::Filled(int count, int64_t value) {
  WEIGHTD_CHECK(count >= 0 && count <= kMaxDims);
  Dims dims;
  for (int i = 0; i < count; ++i) dims.push_back(value);
  return dims;
}

int64_t NumElements(const Dims& dims) {
  int64_t count = 1;
  for (int64_t extent : dims) count *= extent;
  return count;
}

bool ValidShape(std::span<const int64_t> shape) {
  if (shape.size() > kMaxDims) return false;
  constexpr int64_t kLimit = int64_t{1} << 62;
  int64_t count = 1;
  for (int64_t extent : shape) {
    if (extent < 0 || extent >= kLimit) return false;
    if (extent > 1 && count >= kLimit / extent) return false;
    count *= std::max<int64_t>(extent, 1);
  }
  return true;
}

Dims RowMajorStrides(const Shape& shape) {
  Dims strides = Dims::Filled(shape.size(), 1);
  for (int i = shape.size() - 2; i >= 0; --i) strides[i] = strides[i + 1] * shape[i + 1];
  return strides;
}

std::string ToString(const Dims& dims) {
  return fmt::format("[{}]", fmt::join(dims.begin(), dims.end(), ", "));
}

Box WholeBox(const Shape& shape) { return {Dims::Filled(shape.size(), 0), shape}; }

Box Intersect(const Box& a, const Box& b) {
  Box common;
  for (int i = 0; i < a.num_dims(); ++i) {
    const int64_t begin = std::max(a.origin[i], b.origin[i]);
    common.origin.push_back(begin);
    common.extent.push_back(std::max<int64_t>(0, std::min(a.end(i), b.end(i)) - begin));
  }
  return common;
}

bool Contains(const Box& outer, const Box& inner) {
  if (inner.empty()) return true;
  for (int i = 0; i < inner.num_dims(); ++i) {
    if (inner.origin[i] < outer.origin[i] || inner.end(i) > outer.end(i)) return false;
  }
  return true;
}

std::string ToString(const Box& box) {
  std::string text = "[";
  for (int i = 0; i < box.num_dims(); ++i) {
    text += fmt::format("{}{}:{}", i == 0 ? "" : ", ", box.origin[i], box.end(i));
  }
  return text + "]";
}

}  // namespace weightd
