#include "daemon/transport/ipc/step_table.h"

#include <optional>
#include <utility>

#include "daemon/device/mapping.h"

namespace weightd {
namespace {

/// Bytes of a window of Verify, for cancellation and progress.
constexpr uint64_t kVerifyWindowBytes = 64 << 20;

uint64_t BytesOf(const Dims& extent, DType dtype) {
  return static_cast<uint64_t>(NumElements(extent)) * SizeBytes(dtype);
}

Status Staged(const std::string& tensor) {
  return Error(StatusCode::kFailedPrecondition, reason::kMemoryMoved,
               "register GPU tensors, or give sync(tensors=...) GPU tensors",
               "shard has no GPU memory: tensor={}", tensor);
}

/// What makes a copy engine worth its launch, and its rows as fast as the link.
constexpr uint64_t kEngineBytes = 1 << 20;
constexpr uint64_t kEngineRowBytes = 8 << 10;

bool SuitsEngine(const std::optional<cuda::PitchedCopy>& copy) {
  return copy.has_value() && copy->rows * copy->row_bytes >= kEngineBytes &&
         (copy->rows == 1 || copy->row_bytes >= kEngineRowBytes);
}

/// Adds one copied item to a table, or to `copies` and its digest to the table.
Status AddCopied(const RangeList& ranges, const BlockItem& item, std::vector<EngineCopy>* copies,
                 cuda::BoxTableBuilder* builder) {
  const auto word = static_cast<uint32_t>(item.word);
  const cuda::RangeBlock to =
      ranges.Locate(item.to.base, item.to.dtype, item.to.extent, item.to.strides);
  if (item.zero_fill) return builder->AddZero(to, word);
  const cuda::RangeBlock from =
      ranges.Locate(item.from.base, item.from.dtype, item.from.extent, item.from.strides);
  if (copies != nullptr) {
    const std::optional<cuda::PitchedCopy> pitched = cuda::AsPitchedCopy(from, to);
    if (SuitsEngine(pitched)) {
      WEIGHTD_RETURN_IF_ERROR(ranges.CheckWritten(to));
      WEIGHTD_RETURN_IF_ERROR(builder->AddDigest(from, item.position, word));
      copies->push_back({*pitched, from.range, from.offset_bytes, to.range, to.offset_bytes});
      return absl::OkStatus();
    }
  }
  return builder->AddCopy(from, to, &item.position, word);
}

/// Adds one item that is read where it should have landed.
Status AddVerified(const RangeList& ranges, const BlockItem& item, cuda::BoxTableBuilder* builder) {
  const auto word = static_cast<uint32_t>(item.word);
  const cuda::RangeBlock block =
      ranges.Locate(item.to.base, item.to.dtype, item.to.extent, item.to.strides);
  if (item.zero_fill) return builder->AddZeroCheck(block, item.param, word);
  return builder->AddDigest(block, item.position, word);
}

}  // namespace

void RangeList::Add(const Binding& binding) {
  if (binding.segment == nullptr) return;
  const auto number = static_cast<uint32_t>(bases_.size());
  const auto [entry, is_new] =
      by_base_.try_emplace(binding.segment, std::pair(number, binding.segment_bytes));
  if (is_new) bases_.push_back(binding.segment);
}

cuda::RangeBlock RangeList::Locate(const std::byte* base, DType dtype, const Dims& extent,
                                   const Dims& strides) const {
  cuda::RangeBlock block;
  block.dtype = dtype;
  block.extent = extent;
  block.strides = strides;
  auto after = by_base_.upper_bound(base);
  if (after == by_base_.begin()) {
    WEIGHTD_CHECK(NumElements(extent) == 0);
    return block;
  }
  --after;
  block.range = after->second.first;
  block.offset_bytes = static_cast<uint64_t>(base - after->first);
  return block;
}

Status RangeList::CheckWritten(const cuda::RangeBlock& block) const {
  const auto range = by_base_.find(bases_[block.range]);
  return CheckBlockInside(range->second.second, block.offset_bytes, block.extent, block.strides,
                          SizeBytes(block.dtype), true);
}

std::vector<uint64_t> RangeList::sizes() const {
  std::vector<uint64_t> sizes(bases_.size());
  for (const auto& [base, entry] : by_base_) sizes[entry.first] = entry.second;
  return sizes;
}

StatusOr<StepTable> BuildTransferTable(const BoundPlan& plan, const StepBinder& binder,
                                       bool copy_engine) {
  StepTable table;
  for (const std::vector<Binding>& rank : plan.sources) {
    for (const Binding& binding : rank) table.ranges.Add(binding);
  }
  for (const Binding& binding : binder.target().params) table.ranges.Add(binding);
  cuda::BoxTableBuilder builder(table.ranges.sizes(), static_cast<uint32_t>(binder.num_words()));
  const RankPlan& rank_plan = *binder.target().plan;
  const std::vector<uint32_t> landed = WritesLanded(rank_plan);
  for (size_t w = 0; w < rank_plan.windows.size(); ++w) {
    const Window& window = rank_plan.windows[w];
    StepWindow step{window.bytes, rank_plan.copies[window.begin].write, landed[w], {}};
    for (uint32_t i = window.begin; i < window.end; ++i) {
      const Copy copy = rank_plan.copies[i];
      WEIGHTD_ASSIGN_OR_RETURN(const BlockItem item, binder.BindCopy(copy));
      if (!item.zero_fill && item.from.base == nullptr) {
        const std::string& name = (*plan.table)[item.position.tensor].name;
        return binder.Fail(Staged(name), name);
      }
      const Status added =
          AddCopied(table.ranges, item, copy_engine ? &step.copies : nullptr, &builder);
      if (!added.ok()) return binder.Fail(added, binder.ParamAt(copy.write));
    }
    builder.EndWindow();
    table.windows.push_back(std::move(step));
  }
  table.image = std::move(builder).Finish();
  return table;
}

StatusOr<StepTable> BuildVerifyTable(const StepBinder& binder) {
  StepTable table;
  for (const Binding& binding : binder.target().params) table.ranges.Add(binding);
  cuda::BoxTableBuilder builder(table.ranges.sizes(), static_cast<uint32_t>(binder.num_words()));
  const size_t num_writes = binder.target().layout->writes.size();
  StepWindow window;
  for (size_t w = 0; w < num_writes; ++w) {
    WEIGHTD_ASSIGN_OR_RETURN(const BlockItem item, binder.BindWrite(w));
    const Status added = AddVerified(table.ranges, item, &builder);
    if (!added.ok()) return binder.Fail(added, binder.ParamAt(w));
    window.bytes += BytesOf(item.to.extent, item.to.dtype);
    window.landed = static_cast<uint32_t>(w + 1);
    if (window.bytes < kVerifyWindowBytes && w + 1 < num_writes) continue;
    builder.EndWindow();
    table.windows.push_back(window);
    window = {0, static_cast<uint32_t>(w + 1), 0, {}};
  }
  table.image = std::move(builder).Finish();
  return table;
}

namespace {

/// Adds every raw and derived parameter by `add`, which gets its position and a block of its shape.
template <typename Add>
Status AddParams(const StepBinder& binder, StepTable* table, cuda::BoxTableBuilder* builder,
                 Add&& add) {
  const RankLayout& layout = *binder.target().layout;
  StepWindow window;
  for (uint32_t i = 0; i < layout.params.size(); ++i) {
    const ParamInfo& param = layout.params[i];
    if (param.kind == ParamKind::kOpaque || !param.alias_of.empty()) continue;
    const Status added =
        add(i, param, host::DigestPosition{i, param.shape, Dims::Filled(param.shape.size(), 0)});
    if (!added.ok()) return binder.Fail(added, param.name);
    window.bytes += BytesOf(param.shape, param.dtype);
    if (window.bytes < kVerifyWindowBytes) continue;
    builder->EndWindow();
    table->windows.push_back(std::exchange(window, {}));
  }
  if (window.bytes > 0) table->windows.push_back(window);
  builder->EndWindow();
  table->image = std::move(*builder).Finish();
  return absl::OkStatus();
}

}  // namespace

StatusOr<StepTable> BuildParamCopyTable(const StepBinder& binder, std::span<const Binding> from) {
  StepTable table;
  for (const Binding& binding : from) table.ranges.Add(binding);
  const std::vector<Binding>& to = binder.target().params;
  for (const Binding& binding : to) table.ranges.Add(binding);
  cuda::BoxTableBuilder builder(table.ranges.sizes(), static_cast<uint32_t>(to.size()));
  WEIGHTD_RETURN_IF_ERROR(AddParams(
      binder, &table, &builder,
      [&](uint32_t i, const ParamInfo& param, const host::DigestPosition& position) {
        return builder.AddCopy(
            table.ranges.Locate(from[i].base, param.dtype, param.shape, from[i].strides),
            table.ranges.Locate(to[i].base, param.dtype, param.shape, to[i].strides), &position, i);
      }));
  return table;
}

StatusOr<StepTable> BuildParamTable(const StepBinder& binder) {
  StepTable table;
  const std::vector<Binding>& to = binder.target().params;
  for (const Binding& binding : to) table.ranges.Add(binding);
  cuda::BoxTableBuilder builder(table.ranges.sizes(), static_cast<uint32_t>(to.size()));
  WEIGHTD_RETURN_IF_ERROR(AddParams(
      binder, &table, &builder,
      [&](uint32_t i, const ParamInfo& param, const host::DigestPosition& position) {
        return builder.AddDigest(
            table.ranges.Locate(to[i].base, param.dtype, param.shape, to[i].strides), position, i);
      }));
  return table;
}

StatusOr<StepTable> BuildShardTable(const BoundPlan& plan, const StepBinder& binder, uint32_t rank,
                                    uint32_t tensor, uint32_t shard) {
  StepTable table;
  const TensorInfo& info = (*plan.table)[tensor];
  const Box& held = binder.Held(rank, tensor, shard);
  const Binding& binding = binder.Source(rank, tensor, shard);
  if (binding.staged) return binder.Fail(Staged(info.name), info.name);
  if (binding.base == nullptr && !held.empty()) return binder.NoMemory(info.name, rank);
  table.ranges.Add(binding);
  cuda::BoxTableBuilder builder(table.ranges.sizes(), 1);
  const host::ConstBlock from = BindSource(binding, held, held, info.dtype);
  const Status added =
      builder.AddDigest(table.ranges.Locate(from.base, from.dtype, from.extent, from.strides),
                        {tensor, info.shape, held.origin}, 0);
  if (!added.ok()) return binder.Fail(added, info.name);
  builder.EndWindow();
  table.windows.push_back({BytesOf(held.extent, info.dtype), 0, 0, {}});
  table.image = std::move(builder).Finish();
  return table;
}

}  // namespace weightd
