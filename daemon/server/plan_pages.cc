#include "daemon/server/plan_pages.h"

#include "daemon/base/version.h"
#include "daemon/wire/convert.h"

namespace weightd {
namespace {

// Starts a new page once the current one is full. Sizes are estimated from what is added.
class Pager {
 public:
  explicit Pager(uint64_t handle) : handle_(handle) { Next(); }

  v1::PlanPage& page() { return pages_.back(); }
  void Added(size_t bytes) { size_ += bytes; }
  bool full() const { return size_ >= static_cast<size_t>(kPageBytes); }
  void Next() {
    pages_.emplace_back().set_plan(handle_);
    size_ = 0;
  }
  std::vector<v1::PlanPage> Take() { return std::move(pages_); }

 private:
  const uint64_t handle_;
  std::vector<v1::PlanPage> pages_;
  size_t size_ = 0;
};

void AddTable(const WorkerPlan& plan, Pager& pager) {
  for (const TensorInfo& tensor : *plan.table) {
    if (pager.full()) pager.Next();
    *pager.page().add_tensors() = ToProto(tensor);
    pager.Added(tensor.name.size() + 32);
  }
  for (size_t rank = 0; rank < plan.sources.size(); ++rank) {
    if (pager.full()) pager.Next();
    pager.page().add_sources(Value(plan.sources[rank]));
    pager.page().add_source_devices(plan.source_devices[rank]);
    pager.Added(12 + plan.source_devices[rank].size());
  }
}

void AddShards(const RankShards& shards, uint32_t rank, Pager& pager) {
  size_t box = 0;
  size_t tensor = 0;
  const size_t tensors = shards.first.size() - 1;
  do {
    if (pager.full()) pager.Next();
    v1::RankShardsPage* page = pager.page().add_shards();
    page->set_source(rank);
    for (; box < shards.boxes.size() && !pager.full(); ++box) {
      *page->add_boxes() = ToProto(shards.boxes[box]);
      pager.Added(48);
    }
    for (; box == shards.boxes.size() && tensor < tensors && !pager.full(); ++tensor) {
      page->add_boxes_per_tensor(shards.first[tensor + 1] - shards.first[tensor]);
      for (uint32_t i = shards.first[tensor]; i < shards.first[tensor + 1]; ++i) {
        page->add_box_index(shards.box_index[i]);
      }
      pager.Added(8);
    }
  } while (box < shards.boxes.size() || tensor < tensors);
}

void AddLayout(const WorkerPlan& plan, uint32_t target, Pager& pager) {
  const RankLayout& layout = *plan.layouts[target];
  size_t param = 0;
  size_t write = 0;
  do {
    if (pager.full()) pager.Next();
    v1::RankWritesPage* page = pager.page().add_writes();
    page->set_target(target);
    page->set_member(Value(plan.targets[target]));
    page->set_label(plan.labels[target]);
    page->set_device(plan.target_devices[target]);
    *page->mutable_coordinates() = ToProto(layout.coordinates);
    for (; param < layout.params.size() && !pager.full(); ++param) {
      *page->add_params() = ToProto(layout.params[param]);
      pager.Added(layout.params[param].name.size() + 32);
    }
    for (; param == layout.params.size() && write < layout.writes.size() && !pager.full();
         ++write) {
      *page->add_writes() = ToProto(layout.writes[write]);
      pager.Added(64);
    }
  } while (param < layout.params.size() || write < layout.writes.size());
}

}  // namespace

std::vector<v1::PlanPage> PlanPages(const WorkerPlan& plan) {
  Pager pager(plan.handle);
  AddTable(plan, pager);
  for (uint32_t rank = 0; rank < plan.shards.size(); ++rank) {
    AddShards(*plan.shards[rank], rank, pager);
  }
  for (uint32_t target = 0; target < plan.layouts.size(); ++target) {
    AddLayout(plan, target, pager);
  }
  v1::PlanPage& last = pager.page();
  last.set_last(true);
  last.set_digest(plan.digest.data(), plan.digest.size());
  last.set_window_bytes(plan.limits.bytes);
  last.set_window_operations(plan.limits.operations);
  for (const auto& [source, target] : plan.wire_pairs) {
    v1::DevicePair* pair = last.add_wire_pairs();
    pair->set_source(source);
    pair->set_target(target);
  }
  last.set_wire_bytes(plan.wire_bytes);
  return pager.Take();
}

}  // namespace weightd
