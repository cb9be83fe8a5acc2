#include "daemon/transport/wire/wire_binder.h"

#include <algorithm>

namespace weightd {

WireBinder::WireBinder(const BoundPlan& plan, const WireSchedule& schedule, std::byte* ring)
    : plan_(plan), schedule_(schedule), ring_(ring) {
  const std::vector<uint32_t>& targets = schedule.sends.targets;
  for (size_t i = 0; i < targets.size(); ++i) {
    if (i == 0 || targets[i] != targets[i - 1]) words_[targets[i]];
  }
  for (auto& [target, words] : words_) {
    words.tensors = TensorsOf(*plan.targets[target].layout);
    words.first = num_words_;
    num_words_ += words.tensors.size() + 1;
  }
}

const std::string& WireBinder::ParamName(uint32_t target, const Write& write) const {
  return plan_.targets[target].layout->params[write.param].name;
}

StatusOr<BlockItem> WireBinder::BindPack(uint32_t i, uint32_t turn) const {
  const Copy copy = schedule_.sends.copies[i];
  const uint32_t target = schedule_.sends.targets[i];
  const RankLayout& layout = *plan_.targets[target].layout;
  const Write& write = layout.writes[copy.write];
  const TensorInfo& tensor = (*plan_.table)[write.tensor];
  const RankShards& shards = plan_.shards[copy.source_rank];
  const uint32_t held = shards.first[write.tensor] + copy.shard;
  const Binding& binding = plan_.sources[copy.source_rank][held];
  if (binding.base == nullptr) {
    return WithTensor(Error(StatusCode::kFailedPrecondition, reason::kMemoryMoved,
                            "register tensors whose memory can be lent",
                            "shard has no mapped memory to be sent from: tensor={} rank={}",
                            tensor.name, copy.source_rank),
                      tensor.name);
  }
  BlockItem item;
  item.param = write.param;
  item.from = BindSource(binding, shards.boxes[shards.box_index[held]], copy.source, tensor.dtype);
  item.to.base = ring_ + SendSlot(schedule_, turn) + schedule_.sends.offsets[i];
  item.to.dtype = layout.params[write.param].dtype;
  item.to.extent = copy.source.extent;
  item.to.strides = RowMajorStrides(copy.source.extent);
  item.position = {write.tensor, tensor.shape, copy.source.origin};
  const Words& words = words_.at(target);
  item.word =
      words.first + static_cast<size_t>(
                        std::lower_bound(words.tensors.begin(), words.tensors.end(), write.tensor) -
                        words.tensors.begin());
  return item;
}

StatusOr<BlockItem> WireBinder::BindScatter(uint32_t i, uint32_t turn) const {
  const Copy copy = schedule_.receives.copies[i];
  const BoundTarget& target = plan_.targets[schedule_.receives.targets[i]];
  const Write& write = target.layout->writes[copy.write];
  const Binding& binding = target.params[write.param];
  const ParamInfo& param = target.layout->params[write.param];
  if (binding.base == nullptr) {
    return WithTensor(Error(StatusCode::kFailedPrecondition, reason::kMemoryMoved,
                            "register the engine's parameters again",
                            "parameter has no memory: param={} rank={}", param.name, target.label),
                      param.name);
  }
  BlockItem item;
  item.param = write.param;
  item.from.base = ring_ + ReceiveSlot(schedule_, turn) + schedule_.receives.offsets[i];
  item.from.dtype = param.dtype;
  item.from.extent = copy.source.extent;
  item.from.strides = RowMajorStrides(copy.source.extent);
  item.to = BindTarget(binding, write, copy.target, copy.source.num_dims(), param.dtype);
  return item;
}

std::vector<std::pair<uint32_t, RankDigests>> WireBinder::Split(
    const std::vector<uint64_t>& words) const {
  std::vector<std::pair<uint32_t, RankDigests>> digests;
  for (const auto& [target, own] : words_) {
    RankDigests rank;
    rank.tensors = own.tensors;
    const auto first = words.begin() + static_cast<std::ptrdiff_t>(own.first);
    rank.words.assign(first, first + static_cast<std::ptrdiff_t>(own.tensors.size() + 1));
    digests.emplace_back(target, std::move(rank));
  }
  return digests;
}

std::string WireBinder::NameAt(uint32_t turn) const {
  if (turn >= schedule_.num_turns) return "";
  for (const WireSide* side : {&schedule_.receives, &schedule_.sends}) {
    const uint32_t i = side->copy_begin(turn);
    if (i == side->copy_end[turn]) continue;
    const uint32_t target = side->targets[i];
    return ParamName(target, plan_.targets[target].layout->writes[side->copies[i].write]);
  }
  return "";
}

}  // namespace weightd
