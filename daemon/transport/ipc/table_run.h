// A step's table in device memory, and one run of it on one lane of the GPU.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/device/cuda/box_kernels.h"
#include "daemon/device/cuda/event.h"
#include "daemon/device/cuda/handles.h"
#include "daemon/device/cuda/stream.h"
#include "daemon/transport/ipc/step_table.h"
#include "daemon/transport/step_binder.h"

namespace weightd {

struct LoadedTable {
  std::vector<uint64_t> key;  ///< plan, target and registrations; empty: not kept
  cuda::BoxTable table;
  cuda::DigestWords words;
  std::vector<StepWindow> windows;
  std::vector<std::byte*> bases;  ///< of the ranges, for the copy engine
};

/// Streams on which one table runs at a time. Lanes run side by side. Move-only.
/// Thread safety: none.
// NOLINTNEXTLINE(bugprone-reserved-identifier): the compiler's own, for the move of an array
class Lane {
 public:
  static StatusOr<Lane> Create(cuda::DeviceId device);
  /// Blocks until nothing of this lane runs any more.
  Status Synchronize() const;
  cuda::StreamRef stream() const { return kernels_.ref(); }

 private:
  friend class TableRun;
  cuda::DeviceId device_{};
  cuda::Stream kernels_;
  cuda::Stream copies_;  ///< of the copy engine; joined to kernels_ after every group
  cuda::Event copied_;
  cuda::Event groups_[2];  ///< the ends of the two groups of windows that may be under way
};

/// One run of a table. Windows are launched in groups, two of them ahead, and reported in order.
/// Thread safety: none.
class TableRun {
 public:
  /// Called for each window that has landed, and with the next one's first parameter.
  using WindowFn = std::function<void(const StepWindow&, const std::string&)>;

  /// Runs with `blocks` blocks (0: one per tile), about `group_bytes` between two looks at
  /// cancellation. \pre everything outlives this
  TableRun(LoadedTable* loaded, const StepBinder* binder, Lane* lane, int blocks,
           uint64_t group_bytes)
      : loaded_(loaded), binder_(binder), lane_(lane), blocks_(blocks), group_bytes_(group_bytes) {}

  /// Waits for what is read: no window is launched before `landed` says that its writes are there.
  /// Until all are, launches have `blocks` blocks (0: one per tile). \pre `landed` outlives this
  void Follow(const std::atomic<uint32_t>* landed, int blocks) {
    landed_ = landed;
    blocks_following_ = blocks;
  }

  /// Launches a group if there is room, reports one that has ended; never blocks. False: nothing of
  /// either could be done now. \error what StepBinder::Check or the GPU says; work may still run
  StatusOr<bool> Advance(const WindowFn& on_window);
  /// True once all has landed: the words can be read.
  bool finished() const { return begun_ > 0 && launched_ == num_windows() && ended_ == begun_; }
  const LoadedTable& loaded() const { return *loaded_; }
  const StepBinder& binder() const { return *binder_; }

 private:
  uint32_t num_windows() const { return static_cast<uint32_t>(loaded_->windows.size()); }
  std::string NameAt(uint32_t window) const;
  uint32_t NumLanded() const;
  Status LaunchGroup(uint32_t landed);
  Status LaunchWindows(uint32_t first, uint32_t end, int blocks);

  LoadedTable* loaded_;
  const StepBinder* binder_;
  Lane* lane_;
  int blocks_;
  uint64_t group_bytes_;
  const std::atomic<uint32_t>* landed_ = nullptr;
  int blocks_following_ = 0;
  uint32_t launched_ = 0;  ///< windows
  uint32_t reported_ = 0;  ///< windows
  uint32_t begun_ = 0;     ///< groups
  uint32_t ended_ = 0;     ///< groups
  uint32_t group_end_[2] = {0, 0};
};

}  // namespace weightd
