#include <algorithm>
#include <numeric>

#include "daemon/plan/copy_split.h"
#include "daemon/plan/transfer_plan.h"

namespace weightd {
namespace {

/// Positions of a layout's writes, grouped by parameter in the order of the list.
struct WritesByParam {
  std::vector<uint32_t> first;  ///< per parameter, plus the end
  std::vector<uint32_t> write;

  explicit WritesByParam(const RankLayout& layout)
      : first(layout.params.size() + 1, 0), write(layout.writes.size()) {
    for (const Write& w : layout.writes) ++first[w.param + 1];
    std::partial_sum(first.begin(), first.end(), first.begin());
    std::vector<uint32_t> next(first.begin(), first.end() - 1);
    for (uint32_t i = 0; i < layout.writes.size(); ++i) write[next[layout.writes[i].param]++] = i;
  }
};

/// Appends the copies of one write to a list, in parts if a copy does not fit a window.
class WriteLister {
 public:
  WriteLister(const RankLayout& layout, uint32_t position, uint64_t window_bytes, CopyList& list)
      : write_(layout.writes[position]),
        element_(SizeBytes(layout.params[write_.param].dtype)),
        window_bytes_(window_bytes),
        list_(list) {
    copy_.write = position;
    copy_.target = write_.target;
  }

  void ListZeroFill() { Split(copy_); }

  /// Adds the part `cell` of the source, which `rank` holds in `shard`.
  void List(const Box& cell, uint32_t rank, uint32_t shard) {
    copy_.source_rank = rank;
    copy_.shard = shard;
    copy_.source = cell;
    for (int j = 0; j < copy_.target.num_dims(); ++j) {
      const int dim = write_.source_dim[static_cast<size_t>(j)];
      if (dim < 0) continue;
      copy_.target.origin[j] =
          write_.target.origin[j] + cell.origin[dim] - write_.source.origin[dim];
      copy_.target.extent[j] = cell.extent[dim];
    }
    Split(copy_);
  }

 private:
  void Split(const Copy& copy) { SplitCopy(copy, write_, element_, window_bytes_, list_); }

  const Write& write_;
  const uint64_t element_;
  const uint64_t window_bytes_;
  CopyList& list_;
  Copy copy_;
};

/// Cuts windows off a growing list of copies.
class WindowCutter {
 public:
  WindowCutter(const WindowLimits& limits, RankPlan& plan) : limits_(limits), plan_(plan) {}

  /// Takes in the copies that were appended since, of one parameter.
  void Take(uint64_t element_bytes) {
    while (window_.end < plan_.copies.size()) {
      const uint64_t bytes = plan_.copies.TargetElements(window_.end) * element_bytes;
      const bool full = window_.bytes + bytes > limits_.bytes ||
                        window_.end - window_.begin >= limits_.operations;
      if (full) Close();
      ++window_.end;
      window_.bytes += bytes;
      plan_.bytes += bytes;
    }
  }

  void Close() {
    if (window_.end > window_.begin) plan_.windows.push_back(window_);
    window_ = {window_.end, window_.end, 0};
  }

 private:
  const WindowLimits& limits_;
  RankPlan& plan_;
  Window window_;
};

}  // namespace

RankPlan EnumerateRank(const TensorTable& table, const SourceGrid& grid, const RankLayout& layout,
                       const WindowLimits& limits) {
  RankPlan plan;
  const WritesByParam writes(layout);
  WindowCutter windows(limits, plan);
  for (uint32_t param : LayerOrder(layout.params)) {
    const size_t first_copy = plan.copies.size();
    for (uint32_t i = writes.first[param]; i < writes.first[param + 1]; ++i) {
      const Write& write = layout.writes[writes.write[i]];
      if (write.target.empty()) continue;
      WriteLister lister(layout, writes.write[i], limits.bytes, plan.copies);
      if (write.zero_fill) {
        lister.ListZeroFill();
        continue;
      }
      WEIGHTD_CHECK(write.tensor < table.size());
      grid.ForEachOwner(write.tensor, write.source,
                        [&lister](const Box& cell, uint32_t rank, uint32_t shard) {
                          lister.List(cell, rank, shard);
                        });
    }
    plan.copies.SortByTarget(first_copy);
    windows.Take(SizeBytes(layout.params[param].dtype));
  }
  windows.Close();
  return plan;
}

}  // namespace weightd
