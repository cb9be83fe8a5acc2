#include "daemon/layout/box.h"

#include <catch2/catch.hpp>

namespace weightd {
namespace {

TEST_CASE("the common part of two boxes is empty where they do not meet") {
  const Box a{{0, 0}, {4, 4}};
  const Box b{{2, 3}, {4, 4}};
  CHECK(Intersect(a, b) == Box{{2, 3}, {2, 1}});
  CHECK(Intersect(a, Box{{4, 0}, {1, 4}}).empty());
}

TEST_CASE("a box contains what lies inside it and every empty box") {
  const Box outer{{1, 1}, {3, 3}};
  CHECK(Contains(outer, Box{{1, 2}, {3, 2}}));
  CHECK_FALSE(Contains(outer, Box{{0, 1}, {2, 2}}));
  CHECK_FALSE(Contains(outer, Box{{2, 2}, {3, 1}}));
  CHECK(Contains(outer, Box{{9, 9}, {0, 1}}));
}

TEST_CASE("a shape with too many dimensions or elements is refused") {
  CHECK(ValidShape(std::vector<int64_t>{4, 0, 8}));
  CHECK_FALSE(ValidShape(std::vector<int64_t>{-1}));
  CHECK_FALSE(ValidShape(std::vector<int64_t>(9, 1)));
  CHECK_FALSE(ValidShape(std::vector<int64_t>{int64_t{1} << 31, int64_t{1} << 31}));
}

}  // namespace
}  // namespace weightd
