// A step of a plan as a table for the box kernels: which ranges it touches, its windows and words.
// Pure: needs no GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/device/cuda/box_table.h"
#include "daemon/transport/step_binder.h"
#include "daemon/transport/transport.h"

namespace weightd {

/// The mapped segments that a step touches, numbered.
class RangeList {
 public:
  /// Adds the segment of a binding that has one.
  void Add(const Binding& binding);
  /// The block that starts at `base`, in range coordinates.
  /// \pre `base` lies in an added segment, or nothing of the block is touched
  cuda::RangeBlock Locate(const std::byte* base, DType dtype, const Dims& extent,
                          const Dims& strides) const;

  /// OK if a block that is written lies in its range and does not overlap itself.
  Status CheckWritten(const cuda::RangeBlock& block) const;

  std::vector<uint64_t> sizes() const;
  const std::vector<std::byte*>& bases() const { return bases_; }

 private:
  std::map<const std::byte*, std::pair<uint32_t, uint64_t>> by_base_;  ///< (number, bytes)
  std::vector<std::byte*> bases_;                                      ///< by number
};

/// A copy that the copy engine makes, while a kernel digests its source.
struct EngineCopy {
  cuda::PitchedCopy shape;
  uint32_t from_range = 0;
  uint64_t from_offset = 0;  ///< bytes
  uint32_t to_range = 0;
  uint64_t to_offset = 0;
};

/// A window as progress tells it, and what of it the table leaves to the copy engine.
struct StepWindow {
  uint64_t bytes = 0;  ///< landed or read
  uint32_t first = 0;  ///< position of its first write in the layout
  /// Of the layout's writes. Transfer: those that have landed once it has. Verify: those that must
  /// have landed before it is read.
  uint32_t landed = 0;
  std::vector<EngineCopy> copies;
};

struct StepTable {
  cuda::BoxImage image;
  RangeList ranges;
  std::vector<StepWindow> windows;
};

/// All windows of targets[target] of a bound plan. `copy_engine`: large copies without a cast that
/// have few, long rows are left to it. \pre binder.SetTarget(target) was called
/// \error FAILED_PRECONDITION MEMORY_MOVED if memory is missing or staged
/// \error INVALID_ARGUMENT SHAPE / DTYPE if a block leaves its segment or cannot be cast
StatusOr<StepTable> BuildTransferTable(const BoundPlan& plan, const StepBinder& binder,
                                       bool copy_engine);

/// The layout's writes as they should lie in the engine's memory. It follows the layout, not the
/// plan's copies: a copy that the plan lacks shows as a difference. \pre, \error as above
StatusOr<StepTable> BuildVerifyTable(const StepBinder& binder);

/// The raw parameters of the engine rank, whole, copied from `from`: one word per parameter.
StatusOr<StepTable> BuildParamCopyTable(const StepBinder& binder, std::span<const Binding> from);
/// The same parameters where they should have landed.
StatusOr<StepTable> BuildParamTable(const StepBinder& binder);

/// One shard in its own dtype; the table has one word.
StatusOr<StepTable> BuildShardTable(const BoundPlan& plan, const StepBinder& binder, uint32_t rank,
                                    uint32_t tensor, uint32_t shard);

}  // namespace weightd
