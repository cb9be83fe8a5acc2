#include "daemon/transport/wire/host_stage.h"

#include "daemon/device/host/box_copy.h"

namespace weightd {

Status HostStage::Reserve(uint64_t bytes) {
  if (bytes == 0) ring_ = {};
  if (bytes > ring_.size()) ring_.resize(bytes);
  return absl::OkStatus();
}

Status HostStage::Begin(const BoundPlan& plan, const WireSchedule& schedule, RunControl&) {
  schedule_ = &schedule;
  binder_.emplace(plan, schedule, ring());
  words_.assign(binder_->num_words(), 0);
  packed_ = scattered_ = 0;
  return absl::OkStatus();
}

Status HostStage::Pack(uint32_t turn) {
  const WireSide& side = schedule_->sends;
  for (uint32_t i = side.copy_begin(turn); i < side.copy_end[turn]; ++i) {
    WEIGHTD_ASSIGN_OR_RETURN(const BlockItem item, binder_->BindPack(i, turn));
    words_[item.word] += host::CopyBlock(kernels_, item.from, item.to, &item.position, false);
  }
  ++packed_;
  return absl::OkStatus();
}

Status HostStage::Scatter(uint32_t turn) {
  const WireSide& side = schedule_->receives;
  for (uint32_t i = side.copy_begin(turn); i < side.copy_end[turn]; ++i) {
    WEIGHTD_ASSIGN_OR_RETURN(const BlockItem item, binder_->BindScatter(i, turn));
    host::CopyBlock(kernels_, item.from, item.to, nullptr, false);
  }
  ++scattered_;
  return absl::OkStatus();
}

}  // namespace weightd
