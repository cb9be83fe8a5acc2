#include "client/src/gather.h"

#include <catch2/catch.hpp>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

namespace weightd {
namespace {

/// Element by element, as the contract says.
std::vector<uint8_t> Slowly(const std::vector<uint8_t>& memory, const Dims& strides,
                            const Box& part, size_t element_bytes) {
  std::vector<uint8_t> out;
  Dims index = Dims::Filled(part.num_dims(), 0);
  for (int64_t n = 0; n < part.num_elements(); ++n) {
    int64_t at = 0;
    for (int d = 0; d < index.size(); ++d) at += (part.origin[d] + index[d]) * strides[d];
    const auto from = memory.begin() + at * static_cast<int64_t>(element_bytes);
    out.insert(out.end(), from, from + static_cast<int64_t>(element_bytes));
    for (int d = index.size() - 1; d >= 0 && ++index[d] == part.extent[d]; --d) index[d] = 0;
  }
  return out;
}

void Check(const Dims& strides, const Box& part, size_t element_bytes) {
  int64_t last = 0;
  for (int d = 0; d < strides.size(); ++d) last += (part.end(d) - 1) * strides[d];
  std::vector<uint8_t> memory(static_cast<size_t>(last + 1) * element_bytes);
  std::iota(memory.begin(), memory.end(), static_cast<uint8_t>(17));
  std::vector<uint8_t> out(static_cast<size_t>(part.num_elements()) * element_bytes);
  Gather(reinterpret_cast<const std::byte*>(memory.data()), strides, part, element_bytes,
         reinterpret_cast<std::byte*>(out.data()));
  CHECK(out == Slowly(memory, strides, part, element_bytes));
}

}  // namespace

TEST_CASE("a part of a row-major block is gathered row by row") {
  Check({8, 1}, {{1, 2}, {3, 4}}, 4);
}

TEST_CASE("a transposed block is gathered in the order of its indices") {
  Check({1, 5}, {{0, 1}, {5, 3}}, 2);
}

TEST_CASE("a scalar and a block of one element are gathered") {
  Check({}, {{}, {}}, 8);
  Check({9, 3}, {{2, 1}, {1, 1}}, 1);
}

TEST_CASE("an empty part writes nothing") {
  std::byte guard{42};
  Gather(nullptr, {4, 1}, {{0, 0}, {0, 4}}, 4, &guard);
  CHECK(guard == std::byte{42});
}

TEST_CASE("random strides and parts are gathered as element by element") {
  std::mt19937 random(20240611);
  const auto draw = [&random](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  for (int round = 0; round < 300; ++round) {
    const auto dims = static_cast<int>(draw(1, 4));
    Dims strides = Dims::Filled(dims, 0);
    Box part{Dims::Filled(dims, 0), Dims::Filled(dims, 0)};
    for (int d = 0; d < dims; ++d) {
      strides[d] = draw(0, 12);
      part.origin[d] = draw(0, 3);
      part.extent[d] = draw(1, 4);
    }
    if (draw(0, 1) == 1) {  // half of them contiguous in their tail
      int64_t step = 1;
      for (int d = dims - 1; d >= 0; --d) {
        strides[d] = step;
        step *= d == 0 ? 1 : part.extent[d] + (draw(0, 2) == 0 ? 1 : 0);
      }
    }
    Check(strides, part, size_t{1} << draw(0, 3));
  }
}

}  // namespace weightd
