#include "tests/gpu/wire/wire_model.h"

#include <numeric>
#include <string>

namespace weightd {
namespace {

constexpr DType kTarget = DType::kBFloat16;

}  // namespace

WireModel::WireModel(std::string_view name, DType source) : source_(source) {
  shards_.front().first = {0};
  const bool moe = name == "moe";
  const int64_t hidden = moe ? 2048 : 4096, vocabulary = moe ? 151936 : 128256;
  Param(hidden, {vocabulary});
  for (int layer = 0; layer < (moe ? 8 : 32); ++layer) {
    Attention(hidden, 4096, moe ? 512 : 1024);
    if (moe) {
      Param(hidden, {128});
      Param(hidden, std::vector<int64_t>(256, 768));
      Param(768, std::vector<int64_t>(128, hidden));
    } else {
      Param(hidden, {14336, 14336});
      Param(14336, {hidden});
    }
  }
  Param(hidden, {1});
  Param(hidden, {vocabulary});
  grid_.emplace(*SourceGrid::Build(table_, shards_));
  plans_.push_back(EnumerateRank(table_, *grid_, layout_, {}));
}

void WireModel::Attention(int64_t hidden, int64_t query, int64_t key_value) {
  Param(hidden, {1});
  Param(hidden, {query, key_value, key_value});
  Param(query, {hidden});
  Param(hidden, {1});
}

void WireModel::Param(int64_t columns, std::vector<int64_t> rows) {
  const auto param = static_cast<uint32_t>(layout_.params.size());
  const int64_t all = std::accumulate(rows.begin(), rows.end(), int64_t{0});
  layout_.params.push_back({"p" + std::to_string(param), {all, columns}, kTarget});
  target_offsets_.push_back(landed_bytes_);
  int64_t row = 0;
  for (const int64_t count : rows) {
    const auto tensor = static_cast<uint32_t>(table_.size());
    const Shape shape = {count, columns};
    table_.push_back({"t" + std::to_string(tensor), shape, source_});
    RankShards& held = shards_.front();
    held.boxes.push_back(WholeBox(shape));
    held.box_index.push_back(tensor);
    held.first.push_back(tensor + 1);
    Write write{tensor, param, false, {}, WholeBox(shape), {{row, 0}, shape}};
    write.source_dim = {0, 1};
    layout_.writes.push_back(write);
    source_offsets_.push_back(source_bytes_);
    source_bytes_ += static_cast<uint64_t>(count * columns) * SizeBytes(source_);
    row += count;
  }
  landed_bytes_ += static_cast<uint64_t>(all * columns) * SizeBytes(kTarget);
}

WireSchedule WireModel::Schedule(std::string_view device, uint64_t staging) const {
  const WirePairs pairs = {{"0", "1"}};
  const std::vector<std::string> sources = {"0"}, targets = {"1"};
  const RankLayout* const layout = &layout_;
  return ScheduleWire({plans_, {&layout, 1}, sources, targets, pairs, staging},
                      std::string(device));
}

BoundPlan WireModel::Bind(std::byte* source, std::byte* target) const {
  const auto bind = [](std::byte* memory, uint64_t size, uint64_t offset, const Shape& shape) {
    Binding binding;
    binding.strides = RowMajorStrides(shape);
    if (memory == nullptr) return binding;
    binding.base = memory + offset;
    binding.segment = memory;
    binding.segment_bytes = size;
    return binding;
  };
  BoundPlan plan;
  plan.table = &table_;
  plan.shards = shards_;
  plan.id = 1;
  plan.registrations = {1};
  plan.sources.resize(1);
  for (size_t i = 0; i < table_.size(); ++i) {
    plan.sources[0].push_back(bind(source, source_bytes_, source_offsets_[i], table_[i].shape));
  }
  BoundTarget& engine = plan.targets.emplace_back();
  engine.layout = &layout_;
  engine.plan = plans_.data();
  engine.label = "engine";
  engine.registration = 1;
  for (size_t i = 0; i < layout_.params.size(); ++i) {
    engine.params.push_back(
        bind(target, landed_bytes_, target_offsets_[i], layout_.params[i].shape));
  }
  return plan;
}

}  // namespace weightd
