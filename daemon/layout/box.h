// Half-open boxes in the index space of a tensor: pure values. Dimensions are counted outermost
// first; sizes are in elements.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

namespace weightd {

/// Most dimensions a tensor may have.
inline constexpr int kMaxDims = 8;

/// A short list of int64, one per dimension, stored inline. Unused entries are zero, so that values
/// compare and hash.
class Dims {
 public:
  Dims() = default;
  Dims(std::initializer_list<int64_t> values);
  /// \pre values.size() <= kMaxDims
  explicit Dims(std::span<const int64_t> values);
  /// `count` dimensions of `value`. \pre 0 <= count <= kMaxDims
  static Dims Filled(int count, int64_t value);

  int size() const { return size_; }
  bool empty() const { return size_ == 0; }
  int64_t operator[](int i) const { return values_[static_cast<size_t>(i)]; }
  int64_t& operator[](int i) { return values_[static_cast<size_t>(i)]; }
  const int64_t* begin() const { return values_.data(); }
  const int64_t* end() const { return values_.data() + size_; }
  void push_back(int64_t value) { values_[static_cast<size_t>(size_++)] = value; }

  bool operator==(const Dims&) const = default;

 private:
  std::array<int64_t, kMaxDims> values_{};
  int8_t size_ = 0;
};

using Shape = Dims;

/// Product of all dimensions; 1 for a scalar. \pre the product fits (see CheckShape)
int64_t NumElements(const Dims& dims);

/// True if all dimensions are >= 0, there are at most kMaxDims and the element count stays below
/// 2^62.
bool ValidShape(std::span<const int64_t> shape);

/// Row-major strides in elements.
Dims RowMajorStrides(const Shape& shape);

/// "[4, 128]".
std::string ToString(const Dims& dims);

/// [origin, origin + extent) per dimension.
struct Box {
  Dims origin;
  Dims extent;

  int num_dims() const { return extent.size(); }
  int64_t num_elements() const { return NumElements(extent); }
  bool empty() const { return num_elements() == 0; }
  int64_t end(int dim) const { return origin[dim] + extent[dim]; }
  bool operator==(const Box&) const = default;
};

/// The box that covers a whole tensor.
Box WholeBox(const Shape& shape);

/// The common part of two boxes of equal dimensionality; empty (extent 0 in some dimension) if
/// there is none.
Box Intersect(const Box& a, const Box& b);

/// True if `inner` lies inside `outer`. An empty inner box is inside.
bool Contains(const Box& outer, const Box& inner);

/// "[0:4, 128:256]".
std::string ToString(const Box& box);

}  // namespace weightd
