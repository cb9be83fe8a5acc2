#include "client/src/staged_memory.h"

#include <algorithm>

#include "client/src/gather.h"
#include "daemon/wire/convert.h"

namespace weightd {

StagedMemory::StagedMemory(std::shared_ptr<const ActorRegistration> registration)
    : registration_(std::move(registration)) {
  Reset();
}

void StagedMemory::Reset() {
  shards_.clear();
  for (const Placement& placement : registration_->memory) {
    const bool staged = !placement.segment.has_value();
    shards_.push_back({shards_.size(), staged ? placement.address : nullptr, placement.strides});
  }
}

Status StagedMemory::Missing(size_t position) const {
  const auto& first = registration_->shards.first;
  const auto after = std::upper_bound(first.begin(), first.end(), position);
  const TensorInfo& tensor = registration_->table[static_cast<size_t>(after - first.begin() - 1)];
  return WithTensor(Error(StatusCode::kFailedPrecondition, reason::kMissingTensor,
                          "pass it to sync(tensors=...), or lend its memory at registration",
                          "staged tensor has no memory: tensor={}", tensor.name),
                    tensor.name);
}

Status StagedMemory::Begin(std::span<const StagedShard> shards) {
  const std::lock_guard lock(mutex_);
  Reset();
  for (const StagedShard& shard : shards) shards_[shard.position] = shard;
  for (size_t i = 0; i < shards_.size(); ++i) {
    const bool staged = !registration_->memory[i].segment.has_value();
    if (staged && shards_[i].address == nullptr) return Missing(i);
  }
  return absl::OkStatus();
}

void StagedMemory::End() {
  const std::lock_guard lock(mutex_);
  Reset();
}

Status StagedMemory::Fill(const v1::RingFill& fill, std::span<std::byte> slot) {
  const RankShards& shards = registration_->shards;
  const auto broken = [&fill](std::string_view what) {
    return Error(StatusCode::kInvalidArgument, reason::kProtocol,
                 "use the daemon and the client library of one release",
                 "worker asked for {} that does not exist: tensor={} box={}", what, fill.index(),
                 fill.box());
  };
  if (fill.index() >= registration_->table.size()) return broken("a tensor");
  const size_t position = size_t{shards.first[fill.index()]} + fill.box();
  if (position >= shards.first[fill.index() + 1]) return broken("a box");
  WEIGHTD_ASSIGN_OR_RETURN(const Box part, FromProto(fill.part()));
  const Box whole = WholeBox(shards.boxes[shards.box_index[position]].extent);
  if (part.num_dims() != whole.num_dims() || !Contains(whole, part)) return broken("a part");
  const size_t element_bytes = SizeBytes(registration_->table[fill.index()].dtype);
  if (static_cast<uint64_t>(part.num_elements()) > slot.size() / element_bytes) {
    return broken("room in the ring");
  }
  const std::lock_guard lock(mutex_);
  const StagedShard& shard = shards_[position];
  if (shard.address == nullptr) return Missing(position);
  Gather(shard.address, shard.strides, part, element_bytes, slot.data());
  return absl::OkStatus();
}

}  // namespace weightd
