#include "daemon/transport/wire/wire_run.h"

#include <vector>

namespace weightd {

std::vector<std::map<uint32_t, uint32_t>> WritesReceived(const WireSchedule& schedule) {
  const WireSide& side = schedule.receives;
  std::map<uint32_t, uint32_t> left;  // the first write of which something is to come
  for (const uint32_t target : side.targets) left[target] = kAllLanded;
  std::vector<std::map<uint32_t, uint32_t>> landed(schedule.num_turns);
  for (uint32_t turn = schedule.num_turns; turn-- > 0;) {
    landed[turn] = left;
    for (uint32_t i = side.copy_begin(turn); i < side.copy_end[turn]; ++i) {
      uint32_t& first = left[side.targets[i]];
      first = std::min(first, side.copies[i].write);
    }
  }
  return landed;
}

/// Starts the group of the next turn, if its parts are packed and a slot to receive into is free.
StatusOr<bool> WireRun::StartGroup() {
  WEIGHTD_ASSIGN_OR_RETURN(const uint32_t packed, stage_.Packed());
  if (started_ == packed || started_ == scattered_ + kWireSlots) return false;
  std::vector<WireMessage> group;
  std::byte* const send = stage_.ring() + SendSlot(schedule_, started_);
  std::byte* const receive = stage_.ring() + ReceiveSlot(schedule_, started_);
  for (const WireOp& op : schedule_.sends.ops_of(started_)) {
    group.push_back({op.peer, true, send + op.offset, op.bytes});
  }
  for (const WireOp& op : schedule_.receives.ops_of(started_)) {
    group.push_back({op.peer, false, receive + op.offset, op.bytes});
  }
  if (!group.empty()) {
    const uint32_t lane = started_ % kWireLanes;
    WEIGHTD_ASSIGN_OR_RETURN(const bool ready, wire_.Ready(lane));
    if (!ready) return false;
    WEIGHTD_RETURN_IF_ERROR(wire_.Start(lane, group));
    ++groups_;
  }
  needs_[started_++ % kWireSlots] = groups_;
  return true;
}

StatusOr<bool> WireRun::Advance() {
  bool moved = false;
  if (packing_ < schedule_.num_turns && packing_ < ended_ + kWireSlots) {
    WEIGHTD_RETURN_IF_ERROR(stage_.Pack(packing_++));
    moved = true;
  }
  WEIGHTD_ASSIGN_OR_RETURN(const bool started, StartGroup());
  moved = moved || started;
  WEIGHTD_ASSIGN_OR_RETURN(const uint64_t groups_ended, wire_.Ended());
  while (ended_ < started_ && needs_[ended_ % kWireSlots] <= groups_ended) {
    WEIGHTD_RETURN_IF_ERROR(stage_.Scatter(ended_++));
    moved = true;
  }
  WEIGHTD_ASSIGN_OR_RETURN(const uint32_t scattered, stage_.Scattered());
  moved = moved || scattered != scattered_;
  scattered_ = scattered;
  return moved;
}

}  // namespace weightd
