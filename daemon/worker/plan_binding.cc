#include "daemon/worker/plan_binding.h"

#include <utility>

#include "daemon/wire/convert.h"

namespace weightd {
namespace {

constexpr char kRegisterAgain[] = "register the rank's memory again";

/// The binding of one box, if the member lends exactly what the plan expects.
StatusOr<Binding> BindBlock(const MemoryBlock* block, const std::string& name,
                            const std::string& rank, const Dims& extent, DType dtype) {
  const auto annotate = [&](Status status) {
    return WithRank(WithTensor(std::move(status), name), rank);
  };
  if (block == nullptr) {
    return annotate(Error(StatusCode::kFailedPrecondition, reason::kMemoryMoved, kRegisterAgain,
                          "rank lends no memory for a tensor of the plan: tensor={} rank={}", name,
                          rank));
  }
  if (block->extent != extent) {
    return annotate(Error(StatusCode::kFailedPrecondition, reason::kShape, kRegisterAgain,
                          "lent memory has another shape: tensor={} rank={} lent={} expected={}",
                          name, rank, ToString(block->extent), ToString(extent)));
  }
  if (block->dtype != dtype) {
    return annotate(Error(StatusCode::kFailedPrecondition, reason::kDtype, kRegisterAgain,
                          "lent memory has another dtype: tensor={} rank={} lent={} expected={}",
                          name, rank, Name(block->dtype), Name(dtype)));
  }
  return block->binding;
}

/// Finds blocks in ascending (index, box) order faster than one search each.
class BlockCursor {
 public:
  explicit BlockCursor(const MemberMemory& memory) : memory_(memory) {}
  const MemoryBlock* Find(uint32_t index, uint32_t box) {
    if (next_ < memory_.blocks.size() && memory_.blocks[next_].index == index &&
        memory_.blocks[next_].box == box) {
      return &memory_.blocks[next_++];
    }
    const MemoryBlock* block = memory_.Find(index, box);
    if (block != nullptr) next_ = static_cast<size_t>(block - memory_.blocks.data()) + 1;
    return block;
  }

 private:
  const MemberMemory& memory_;
  size_t next_ = 0;
};

}  // namespace

Status BindSources(const LoadedPlan& plan, const PinnedMembers& pinned, BoundPlan* bound) {
  const PlanInput& in = plan.input;
  bound->table = &in.table;
  bound->shards = in.shards;
  bound->id = plan.id;
  bound->sources.assign(in.shards.size(), {});
  bound->registrations.assign(in.shards.size(), 0);
  for (size_t rank = 0; rank < in.shards.size(); ++rank) {
    if (!plan.own_sources[rank]) continue;
    const PinnedMembers::Entry* entry = pinned.Find(in.sources[rank]);
    WEIGHTD_CHECK(entry != nullptr);
    bound->registrations[rank] = entry->memory->id;
    const RankShards& shards = in.shards[rank];
    std::vector<Binding>& bindings = bound->sources[rank];
    bindings.reserve(shards.box_index.size());
    BlockCursor cursor(*entry->memory);
    for (uint32_t tensor = 0; tensor < in.table.size(); ++tensor) {
      for (uint32_t i = shards.first[tensor]; i < shards.first[tensor + 1]; ++i) {
        const Box& box = shards.boxes[shards.box_index[i]];
        if (box.empty()) {
          bindings.emplace_back();
          continue;
        }
        WEIGHTD_ASSIGN_OR_RETURN(
            Binding binding,
            BindBlock(cursor.Find(tensor, i - shards.first[tensor]), in.table[tensor].name,
                      entry->member->label(), box.extent, in.table[tensor].dtype));
        bindings.push_back(binding);
      }
    }
  }
  return absl::OkStatus();
}

StatusOr<std::vector<Binding>> BindParams(const RankLayout& layout,
                                          std::span<const uint32_t> positions,
                                          const std::string& label, const MemberMemory& memory) {
  std::vector<Binding> bindings(layout.params.size());
  BlockCursor cursor(memory);
  for (uint32_t i = 0; i < layout.params.size(); ++i) {
    const ParamInfo& param = layout.params[i];
    if (param.kind == ParamKind::kOpaque || !param.alias_of.empty()) continue;
    const MemoryBlock* block = cursor.Find(positions.empty() ? i : positions[i], 0);
    WEIGHTD_ASSIGN_OR_RETURN(bindings[i],
                             BindBlock(block, param.name, label, param.shape, param.dtype));
  }
  return bindings;
}

void DescribeEngineRank(const LoadedPlan& plan, uint32_t target, uint32_t round, BoundPlan* bound) {
  const PlanInput& in = plan.input;
  bound->table = &in.table;
  bound->shards = in.shards;
  bound->id = plan.id;
  bound->targets.resize(in.layouts.size());
  BoundTarget& result = bound->targets[target];
  const RankRound& part = plan.ranks[target][round];
  result.layout = part.layout;
  result.plan = &part.plan;
  result.round = round;
  result.label = in.labels[target];
}

Status BindEngineRank(const LoadedPlan& plan, uint32_t target, uint32_t round,
                      const PinnedMembers& pinned, BoundPlan* bound) {
  const PlanInput& in = plan.input;
  DescribeEngineRank(plan, target, round, bound);
  const PinnedMembers::Entry* entry = pinned.Find(in.targets[target]);
  WEIGHTD_CHECK(entry != nullptr);
  const RankRound& part = plan.ranks[target][round];
  BoundTarget& result = bound->targets[target];
  result.label = entry->member->label();
  result.registration = entry->memory->id;
  result.remote = in.target_devices[target] != plan.device;
  if (!entry->member->identity().writable) {
    return Error(StatusCode::kFailedPrecondition, reason::kProtocol, "register it as an engine",
                 "plan writes to memory that was lent for reading: rank={}", result.label);
  }
  WEIGHTD_ASSIGN_OR_RETURN(result.params,
                           BindParams(*part.layout, part.params, result.label, *entry->memory));
  return absl::OkStatus();
}

namespace {

Status CheckAll(const PinnedMembers& pinned, std::span<const uint64_t> members, bool sizes) {
  for (uint64_t id : members) {
    const PinnedMembers::Entry* entry = pinned.Find(id);
    WEIGHTD_CHECK(entry != nullptr);
    WEIGHTD_RETURN_IF_ERROR(WithRank(entry->memory->CheckIntact(sizes), entry->member->label()));
  }
  return absl::OkStatus();
}

}  // namespace

Status CheckIntactBefore(const PinnedMembers& pinned, std::span<const uint64_t> members) {
  // Two system calls take about as long as copying some ten kilobytes.
  constexpr uint64_t kWorthwhileBytes = 1u << 20;  // of a segment, on average
  constexpr uint64_t kCheapSegments = 64;          // whatever their size
  uint64_t segments = 0;
  uint64_t bytes = 0;
  for (uint64_t id : members) {
    const PinnedMembers::Entry* entry = pinned.Find(id);
    WEIGHTD_CHECK(entry != nullptr);
    segments += entry->memory->segments.size();
    bytes += entry->memory->mapped_bytes;
  }
  return CheckAll(pinned, members,
                  segments <= kCheapSegments || bytes / segments >= kWorthwhileBytes);
}

Status CheckIntactAfter(const PinnedMembers& pinned, std::span<const uint64_t> members) {
  return CheckAll(pinned, members, false);
}

StatusOr<const std::byte*> RingSource::Fetch(uint32_t rank, uint32_t tensor, uint32_t shard,
                                             const Box& part) {
  const TensorInfo& info = plan_.input.table[tensor];
  const PinnedMembers::Entry* entry = pinned_.Find(plan_.input.sources[rank]);
  WEIGHTD_CHECK(entry != nullptr);
  WEIGHTD_CHECK(static_cast<uint64_t>(part.num_elements()) * SizeBytes(info.dtype) <= kRingBytes);
  v1::RingFill request;
  *request.mutable_attempt() = attempt_;
  request.set_index(tensor);
  request.set_box(shard);
  *request.mutable_part() = ToProto(part);
  StatusOr<const std::byte*> bytes = entry->member->Fill(request, cancelled_, deadline_);
  if (!bytes.ok()) return WithTensor(bytes.status(), info.name);
  return bytes;
}

}  // namespace weightd
