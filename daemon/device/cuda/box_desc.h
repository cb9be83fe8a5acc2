// What the box kernels read: plain structs, and the arithmetic on them that host and device share.
// Free of CUDA and of the standard library's containers, so that both compilers take it.
#pragma once

#include <cstdint>

namespace weightd::cuda {

/// One registered piece of memory.
struct MemoryRange {
  uint64_t base = 0;  ///< device address
  uint64_t size_bytes = 0;
};

/// Dimensions that a descriptor can hold after neighbouring ones were joined. A box with more is
/// cut into several descriptors.
inline constexpr int kDescDims = 5;

/// One dimension of a box.
struct BoxDim {
  uint32_t extent = 1;
  uint32_t column = 0;  ///< columns of the source tensor per step: 1 for its last dimension, else 0
  uint64_t from = 0;    ///< bytes per step
  uint64_t to = 0;
  uint64_t row = 0;  ///< rows of the source tensor per step
};

/// What is done with each element.
enum class BoxKind : uint8_t {
  kCopy,  ///< bits are copied
  kFloat32ToBFloat16,
  kFloat32ToFloat16,
  kFloat16ToBFloat16,
  kBFloat16ToFloat16,
  kFloat16ToFloat32,
  kBFloat16ToFloat32,
  kDigest,     ///< read only
  kZero,       ///< written only
  kZeroCheck,  ///< read only
};

/// Kernels, and with them the sections of a table.
inline constexpr int kTilesSection = 0;     ///< transposed through shared memory, any kind
inline constexpr int kElementsSection = 1;  ///< element by element, and zeros
inline constexpr int kVectorsSection = 2;   ///< + kind, from kCopy to kDigest: whole vectors
inline constexpr int kNumSections = kVectorsSection + static_cast<int>(BoxKind::kDigest) + 1;

/// A box, cut into units (a warp's or part of a warp's work without branches) and tiles.
///
/// Elements and vectors: dims[0] runs along memory on both sides; a unit is the part of one row
/// that lies in one digest block, `lanes` threads share it; a tile is `units_per_tile` units.
/// Tiles: dims[0] runs along source memory and dims[1] along target memory; a tile is
/// kTileSide x kTileSide elements of them.
struct alignas(16) BoxDesc {
  uint64_t from_offset = 0;  ///< bytes into ranges[from_range]
  uint64_t to_offset = 0;
  uint64_t key = 0;        ///< TensorKey, or what an element that is not zero adds (kZeroCheck)
  uint64_t first_row = 0;  ///< of the box in the source tensor
  uint64_t first_column = 0;
  uint32_t from_range = 0;
  uint32_t to_range = 0;
  uint32_t word = 0;
  uint32_t first_tile = 0;
  uint32_t units = 0;
  uint32_t units_per_tile = 0;
  uint32_t parts = 1;       ///< rows: units per row; tiles: tiles along dims[0]
  uint32_t first_part = 0;  ///< rows: elements of the first unit of a row; tiles: along dims[1]
  BoxKind kind = BoxKind::kCopy;
  uint8_t from_size = 0;  ///< bytes of an element, 0 if nothing is read
  uint8_t to_size = 0;    ///< 0 if nothing is written
  uint8_t lanes = 32;
  uint8_t num_dims = 1;
  bool digest = false;
  bool vectors = false;  ///< rows: everything is aligned to 16-byte vectors
  BoxDim dims[kDescDims];
};

}  // namespace weightd::cuda
