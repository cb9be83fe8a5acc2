// Full tensors as matrices of element numbers, and the slicing that engines' weight loaders do.
#pragma once

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "tests/unit/layout/rank_image.h"

namespace weightd::test {

/// A row-major matrix [rows, columns]; vectors have one column.
struct Matrix {
  int64_t rows = 0;
  int64_t columns = 0;
  std::vector<int64_t> values;
};

inline Matrix Filled(int64_t rows, int64_t columns, int64_t value) {
  return {rows, columns, std::vector<int64_t>(static_cast<size_t>(rows * columns), value)};
}

/// The tensor's elements, each with its own number.
inline Matrix Source(const TensorTable& table, const std::string& name) {
  for (size_t t = 0; t < table.size(); ++t) {
    if (table[t].name != name) continue;
    const Shape& shape = table[t].shape;
    const int64_t columns = shape.size() > 1 ? shape[shape.size() - 1] : 1;
    Matrix matrix = Filled(NumElements(shape) / columns, columns, 0);
    for (size_t i = 0; i < matrix.values.size(); ++i) {
      matrix.values[i] = Element(static_cast<int64_t>(t), static_cast<int64_t>(i));
    }
    return matrix;
  }
  FAIL("no tensor " << name);
  return {};
}

inline Matrix Rows(const Matrix& from, int64_t begin, int64_t count) {
  Matrix to = Filled(count, from.columns, 0);
  std::copy_n(from.values.begin() + begin * from.columns, count * from.columns, to.values.begin());
  return to;
}

inline Matrix Transposed(const Matrix& from) {
  Matrix to = Filled(from.columns, from.rows, 0);
  for (int64_t r = 0; r < from.rows; ++r) {
    for (int64_t c = 0; c < from.columns; ++c) {
      to.values[static_cast<size_t>(c * from.rows + r)] =
          from.values[static_cast<size_t>(r * from.columns + c)];
    }
  }
  return to;
}

inline Matrix Columns(const Matrix& from, int64_t begin, int64_t count) {
  return Transposed(Rows(Transposed(from), begin, count));
}

inline Matrix Stack(std::initializer_list<Matrix> parts) {
  Matrix all;
  for (const Matrix& part : parts) {
    all.columns = part.columns;
    all.rows += part.rows;
    all.values.insert(all.values.end(), part.values.begin(), part.values.end());
  }
  return all;
}

}  // namespace weightd::test
