// The seam between the launcher, which knows Status, and the kernels, which know CUDA.
#pragma once

#include <cstdint>

#include "daemon/device/cuda/box_desc.h"
#include "daemon/device/cuda/handles.h"

namespace weightd::cuda {

/// What one launch works on. All pointers are device memory.
struct BoxArgs {
  const BoxDesc* boxes = nullptr;
  const uint32_t* box_of_tile = nullptr;
  const MemoryRange* ranges = nullptr;
  uint32_t num_ranges = 0;
  uint32_t first_tile = 0;
  uint32_t end_tile = 0;
  unsigned long long* words = nullptr;
  unsigned long long* report = nullptr;  ///< 1 + index of a box that was refused, 0 if none was
};

inline constexpr int kRowThreads = 512;
inline constexpr int kTileThreads = 256;

/// Enqueue a kernel on the current device; the result is a cudaError_t. \pre first_tile < end_tile,
/// the boxes are of the kernel's section (box_desc.h)
int LaunchVectors(BoxKind kind, const BoxArgs& args, int num_blocks, StreamRef stream);
int LaunchElements(const BoxArgs& args, int num_blocks, StreamRef stream);
int LaunchTiles(const BoxArgs& args, int num_blocks, StreamRef stream);

}  // namespace weightd::cuda
