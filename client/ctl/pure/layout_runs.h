// A rank's layout, element by element, as runs.
#pragma once

#include <cstdint>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/layout/tensor_layout.h"

namespace weightd {

/// `length` elements of a parameter from `offset` on are elements start, start + stride, ... of
/// source tensor `source`, all row-major. Source -1 is zero fill, with start and stride 0.
struct Run {
  int64_t offset = 0;
  int64_t length = 0;
  int64_t source = -1;
  int64_t start = 0;
  int64_t stride = 0;
  bool operator==(const Run&) const = default;
};

/// Per parameter of `layout` its runs: in order, covering every element once, each as long as
/// extending it element by element makes it.
/// \error INTERNAL GAP / OVERLAP if the writes do not cover a parameter exactly once
StatusOr<std::vector<std::vector<Run>>> RunsOf(const RankLayout& layout, const TensorTable& table);

}  // namespace weightd
