// Turns one box of any size and number of dimensions into descriptors, for box_table.cc alone.
#pragma once

#include <cstdint>
#include <vector>

#include "daemon/device/cuda/box_desc.h"

namespace weightd::cuda {

struct BoxImage;

/// A BoxDim before it is known to fit.
struct WideDim {
  uint64_t extent = 1;
  uint64_t from = 0;
  uint64_t to = 0;
  uint64_t row = 0;
  uint32_t column = 0;
};

/// A box with any number of dimensions, none of extent 1. `desc` has everything but dims and
/// cuts.
struct WideBox {
  BoxDesc desc;
  std::vector<WideDim> dims;
};

/// Joins every pair of dimensions that lie behind each other on both sides and in the digest.
void JoinDims(std::vector<WideDim>& dims);

/// Joins dimensions, picks the kernel, cuts into descriptors and tiles and appends them.
void AppendBox(WideBox box, BoxImage& image);

}  // namespace weightd::cuda
