#include "daemon/transport/ipc/table_run.h"

#include "daemon/device/cuda/pitched_copy.h"

namespace weightd {

StatusOr<Lane> Lane::Create(cuda::DeviceId device) {
  Lane lane;
  lane.device_ = device;
  WEIGHTD_ASSIGN_OR_RETURN(lane.kernels_, cuda::Stream::Create(device, true));
  WEIGHTD_ASSIGN_OR_RETURN(lane.copies_, cuda::Stream::Create(device, true));
  WEIGHTD_ASSIGN_OR_RETURN(lane.copied_, cuda::Event::Create(device));
  for (cuda::Event& group : lane.groups_) {
    WEIGHTD_ASSIGN_OR_RETURN(group, cuda::Event::Create(device));
  }
  return lane;
}

Status Lane::Synchronize() const {
  const Status copied = copies_.Synchronize();
  const Status done = kernels_.Synchronize();
  return copied.ok() ? done : copied;
}

std::string TableRun::NameAt(uint32_t window) const {
  return window < num_windows() ? binder_->ParamAt(loaded_->windows[window].first) : "";
}

/// Kernels run on one stream, the copy engine on another, which the first then waits for.
Status TableRun::LaunchWindows(uint32_t first, uint32_t end, int blocks) {
  const cuda::StreamRef stream = lane_->kernels_.ref();
  bool copies = false;
  for (uint32_t w = first; w < end; ++w) {
    for (const EngineCopy& copy : loaded_->windows[w].copies) {
      copies = true;
      WEIGHTD_RETURN_IF_ERROR(cuda::CopyPitched(
          copy.shape, loaded_->bases[copy.from_range] + copy.from_offset,
          loaded_->bases[copy.to_range] + copy.to_offset, lane_->device_, lane_->copies_.ref()));
    }
  }
  WEIGHTD_RETURN_IF_ERROR(cuda::Launch(loaded_->table, first, end, loaded_->words, blocks, stream));
  if (!copies) return absl::OkStatus();
  WEIGHTD_RETURN_IF_ERROR(lane_->copied_.Record(lane_->copies_.ref()));
  return lane_->kernels_.Wait(lane_->copied_.ref());
}

uint32_t TableRun::NumLanded() const {
  return landed_ == nullptr ? kAllLanded : landed_->load(std::memory_order_acquire);
}

/// As many windows as one group has, of those whose writes are among the first `landed`. \pre the
/// next one's are, if there is one
Status TableRun::LaunchGroup(uint32_t landed) {
  const cuda::StreamRef stream = lane_->kernels_.ref();
  WEIGHTD_RETURN_IF_ERROR(binder_->Check(NameAt(launched_)));
  if (begun_ == 0) WEIGHTD_RETURN_IF_ERROR(loaded_->words.Clear(stream));
  const uint32_t first = launched_;
  uint64_t bytes = 0;
  while (launched_ < num_windows() && (bytes == 0 || bytes < group_bytes_) &&
         loaded_->windows[launched_].landed <= landed) {
    bytes += loaded_->windows[launched_++].bytes;
  }
  const int blocks = landed == kAllLanded ? blocks_ : blocks_following_;
  WEIGHTD_RETURN_IF_ERROR(LaunchWindows(first, launched_, blocks));
  if (launched_ == num_windows()) WEIGHTD_RETURN_IF_ERROR(loaded_->words.Fetch(stream));
  WEIGHTD_RETURN_IF_ERROR(lane_->groups_[begun_ % 2].Record(stream));
  group_end_[begun_++ % 2] = launched_;
  return absl::OkStatus();
}

StatusOr<bool> TableRun::Advance(const WindowFn& on_window) {
  bool moved = false;
  const bool more = begun_ == 0 || launched_ < num_windows();
  if (more && begun_ - ended_ < 2) {
    const uint32_t landed = NumLanded();
    moved = launched_ == num_windows() || loaded_->windows[launched_].landed <= landed;
    WEIGHTD_RETURN_IF_ERROR(moved ? LaunchGroup(landed) : binder_->Check(NameAt(launched_)));
  }
  if (ended_ == begun_) return moved;
  WEIGHTD_ASSIGN_OR_RETURN(const bool done, lane_->groups_[ended_ % 2].Done());
  if (!done) return moved;
  const uint32_t end = group_end_[ended_++ % 2];
  while (reported_ < end) {
    const StepWindow& window = loaded_->windows[reported_++];
    on_window(window, NameAt(reported_));
  }
  return true;
}

}  // namespace weightd
