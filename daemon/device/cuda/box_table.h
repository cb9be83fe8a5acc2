// Many boxes as one table for the box kernels: described and checked on the host, addresses left
// out. Pure values: needs no GPU.
//
// A *range* is one registered piece of memory (a segment, a bucket, a ring). Boxes say range and
// offset, so the same table serves again when a range moves: only the bases are uploaded anew.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/device/cuda/box_desc.h"
#include "daemon/device/host/digest.h"
#include "daemon/layout/box.h"
#include "daemon/layout/dtype.h"

namespace weightd::cuda {

/// A strided block in a range. As host::ConstBlock: dimension d of `extent` and `strides` is
/// dimension d of the source tensor; strides are in elements and not negative.
struct RangeBlock {
  uint32_t range = 0;         ///< index of the range
  uint64_t offset_bytes = 0;  ///< of the first element; a multiple of the element's size
  DType dtype = DType::kUnspecified;
  Dims extent;
  Dims strides;
};

/// A finished table. Windows are what one launch covers at least.
struct BoxImage {
  /// What one kernel works on: descriptors, and for each tile its descriptor.
  struct Section {
    std::vector<BoxDesc> boxes;
    std::vector<uint32_t> box_of_tile;
    std::vector<uint32_t> window_end;  ///< tiles before the end of each window
  };
  std::array<Section, kNumSections> sections;
  std::vector<uint64_t> range_bytes;
  uint32_t num_words = 0;

  uint32_t num_windows() const { return static_cast<uint32_t>(sections[0].window_end.size()); }
  /// Device memory that the table takes.
  uint64_t size_bytes() const;
};

/// Collects boxes. Each Add checks everything that can be checked without addresses and adds
/// nothing if it refuses. Empty boxes are fine and cost nothing.
/// \error INVALID_ARGUMENT SHAPE if a block leaves its range, extents differ, strides are negative,
/// an offset is not a multiple of the element's size, or a written block overlaps itself
/// \error INVALID_ARGUMENT DTYPE if the cast does not exist
class BoxTableBuilder {
 public:
  /// Sizes of the registered ranges, and the number of digest words that boxes may name.
  BoxTableBuilder(std::vector<uint64_t> range_bytes, uint32_t num_words);

  /// Copies `from` to `to`, casting if the dtypes differ. With `position` adds the digest of what
  /// was written to words[word]. \pre the blocks do not overlap
  Status AddCopy(const RangeBlock& from, const RangeBlock& to, const host::DigestPosition* position,
                 uint32_t word);
  /// Adds the digest of a block as it lies in memory to words[word].
  Status AddDigest(const RangeBlock& block, const host::DigestPosition& position, uint32_t word);
  /// Writes zeros and adds the number of elements to words[word], as the source's zero-fill word.
  Status AddZero(const RangeBlock& to, uint32_t word);
  /// Adds host::ZeroFillWord of a block that should hold zeros only to words[word].
  Status AddZeroCheck(const RangeBlock& block, uint64_t param, uint32_t word);
  /// Ends a window. Boxes added after the last EndWindow form one more.
  void EndWindow();

  BoxImage Finish() &&;

 private:
  Status CheckBlock(const RangeBlock& block, bool written) const;
  Status CheckWord(uint32_t word) const;

  BoxImage image_;
  bool window_open_ = false;
};

/// A copy that a copy engine does as well: equal dtypes, and on both sides `rows` runs of
/// `row_bytes` at a fixed pitch (rows == 1: one run, cudaMemcpyAsync; else cudaMemcpy2DAsync).
struct PitchedCopy {
  uint64_t rows = 0;
  uint64_t row_bytes = 0;
  uint64_t from_pitch = 0;
  uint64_t to_pitch = 0;
};

/// The pitched form of a copy without a cast, or nullopt if it has none or no elements. Whether it
/// pays is the caller's choice: copy engines are measured at the link's rate for rows of >= 8 KiB.
std::optional<PitchedCopy> AsPitchedCopy(const RangeBlock& from, const RangeBlock& to);

}  // namespace weightd::cuda
