#include "daemon/plan/tiling.h"

#include <catch2/catch.hpp>

namespace weightd {
namespace {

using Boxes = std::vector<Box>;

Box Block(int64_t row, int64_t rows, int64_t column, int64_t columns) {
  return {{row, column}, {rows, columns}};
}

TEST_CASE("boxes that touch do not overlap, boxes with a common element do") {
  CHECK_FALSE(FindOverlap(Boxes{Block(0, 2, 0, 4), Block(2, 2, 0, 4)}));
  CHECK_FALSE(FindOverlap(Boxes{Block(0, 4, 0, 4), Block(1, 0, 0, 4)}));
  CHECK(FindOverlap(Boxes{Block(3, 1, 3, 1), Block(0, 2, 0, 2), Block(1, 2, 1, 2)}) ==
        std::pair<size_t, size_t>(1, 2));
  CHECK(FindOverlap(Boxes{Box(), Box()}).has_value());  // two scalars
}

TEST_CASE("the first gap is found in row-major order") {
  CHECK_FALSE(FindGap({4, 4}, Boxes{Block(0, 4, 0, 2), Block(0, 2, 2, 2), Block(2, 2, 2, 2)}));
  CHECK(FindGap({4, 4}, Boxes{Block(0, 4, 0, 2), Block(0, 2, 2, 2)}) == Block(2, 2, 2, 2));
  CHECK(FindGap({4, 4}, Boxes{}) == Block(0, 4, 0, 4));
  CHECK(FindGap({4, 4}, Boxes{Block(1, 2, 0, 4), Block(1, 3, 0, 4)}) == Block(0, 1, 0, 4));
  CHECK_FALSE(FindGap({0, 4}, Boxes{}));
  CHECK_FALSE(FindGap({}, Boxes{Box()}));
  CHECK(FindGap({}, Boxes{}) == Box());
}

TEST_CASE("slices that arrive in order stay one box of a union") {
  Boxes columns;
  for (int64_t i = 0; i < 32; ++i) AddToUnion(columns, Block(0, 8, 4 * i, 4));
  CHECK(columns == Boxes{Block(0, 8, 0, 128)});
  Boxes backwards;
  for (int64_t i = 32; i-- > 0;) AddToUnion(backwards, Block(4 * i, 4, 0, 8));
  CHECK(backwards == Boxes{Block(0, 128, 0, 8)});
}

TEST_CASE("a union never covers more than its boxes do") {
  Boxes corner;
  AddToUnion(corner, Block(0, 2, 0, 2));
  AddToUnion(corner, Block(2, 2, 2, 2));
  CHECK(corner.size() == 2);
  AddToUnion(corner, Block(0, 2, 1, 3));  // overlaps the first, joins it along the columns
  CHECK(corner == Boxes{Block(0, 2, 0, 4), Block(2, 2, 2, 2)});
  AddToUnion(corner, Block(0, 1, 1, 1));
  AddToUnion(corner, Block(3, 0, 0, 4));
  CHECK(corner.size() == 2);
  CHECK(FindGap({4, 4}, corner) == Block(2, 2, 0, 2));
}

TEST_CASE("fitting a shape is safe for any numbers") {
  CHECK(FitsShape(Block(3, 1, 0, 4), {4, 4}));
  CHECK(FitsShape(Block(4, 0, 0, 4), {4, 4}));
  CHECK_FALSE(FitsShape(Block(4, 1, 0, 4), {4, 4}));
  CHECK_FALSE(FitsShape(Block(INT64_MAX, INT64_MAX, 0, 4), {4, 4}));
  CHECK_FALSE(FitsShape(Block(0, INT64_MIN, 0, 4), {4, 4}));
  CHECK_FALSE(FitsShape(Block(0, 4, 0, 4), {4}));
}

}  // namespace
}  // namespace weightd
