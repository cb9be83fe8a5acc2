#include <algorithm>
#include <numeric>

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

/// Where the part `cell` of a write's source lands. Permutation is the write's.
Box TargetOf(const Write& write, const Box& cell) {
  Box target = write.target;
  for (int j = 0; j < target.num_dims(); ++j) {
    const int dim = write.source_dim[static_cast<size_t>(j)];
    if (dim < 0) continue;
    target.origin[j] += cell.origin[dim] - write.source.origin[dim];
    target.extent[j] = cell.extent[dim];
  }
  return target;
}

/// Appends copies to a plan, in their final order, and cuts windows.
class WindowCutter {
 public:
  WindowCutter(const RankLayout& layout, const WindowLimits& limits)
      : layout_(layout), limits_(limits) {}

  /// Adds a copy, in parts along its outer dimensions if it does not fit a window.
  void Add(const Copy& copy) {
    const Write& write = layout_.writes[copy.write];
    const uint64_t element = SizeBytes(layout_.params[write.param].dtype);
    const uint64_t bytes = static_cast<uint64_t>(copy.target.num_elements()) * element;
    const int dim = bytes <= limits_.bytes ? copy.target.num_dims() : OuterDim(copy.target);
    if (dim == copy.target.num_dims()) {
      Append(copy, bytes);
      return;
    }
    const int64_t extent = copy.target.extent[dim];
    const uint64_t slice_bytes = bytes / static_cast<uint64_t>(extent);
    const auto step = static_cast<int64_t>(std::max<uint64_t>(1, limits_.bytes / slice_bytes));
    for (int64_t begin = 0; begin < extent; begin += step) {
      Add(Slice(copy, write, dim, begin, std::min(step, extent - begin)));
    }
  }

  RankPlan Finish() && {
    Close();
    plan_.copies.shrink_to_fit();
    return std::move(plan_);
  }

 private:
  /// Outermost dimension that can be cut; num_dims() if there is none.
  static int OuterDim(const Box& box) {
    int dim = 0;
    while (dim < box.num_dims() && box.extent[dim] == 1) ++dim;
    return dim;
  }

  static Copy Slice(Copy copy, const Write& write, int dim, int64_t begin, int64_t extent) {
    copy.target.origin[dim] += begin;
    copy.target.extent[dim] = extent;
    const int source_dim = write.source_dim[static_cast<size_t>(dim)];
    if (!write.zero_fill && source_dim >= 0) {
      copy.source.origin[source_dim] += begin;
      copy.source.extent[source_dim] = extent;
    }
    return copy;
  }

  void Append(const Copy& copy, uint64_t bytes) {
    const bool full =
        window_.bytes + bytes > limits_.bytes || window_.end - window_.begin >= limits_.operations;
    if (full) Close();
    plan_.copies.push_back(copy);
    ++window_.end;
    window_.bytes += bytes;
    plan_.bytes += bytes;
  }

  void Close() {
    if (window_.end > window_.begin) plan_.windows.push_back(window_);
    window_ = {window_.end, window_.end, 0};
  }

  const RankLayout& layout_;
  const WindowLimits& limits_;
  RankPlan plan_;
  Window window_;
};

bool LandsBefore(const Copy& a, const Copy& b) {
  return std::lexicographical_compare(a.target.origin.begin(), a.target.origin.end(),
                                      b.target.origin.begin(), b.target.origin.end());
}

}  // namespace

RankPlan EnumerateRank(const TensorTable& table, const SourceGrid& grid, const RankLayout& layout,
                       const WindowLimits& limits) {
  const WritesByParam writes(layout);
  WindowCutter cutter(layout, limits);
  std::vector<Copy> copies;  // of one parameter
  for (uint32_t param : LayerOrder(layout.params)) {
    copies.clear();
    for (uint32_t i = writes.first[param]; i < writes.first[param + 1]; ++i) {
      const uint32_t position = writes.write[i];
      const Write& write = layout.writes[position];
      if (write.target.empty()) continue;
      if (write.zero_fill) {
        copies.push_back({position, 0, 0, Box(), write.target});
        continue;
      }
      WEIGHTD_CHECK(write.tensor < table.size());
      grid.ForEachOwner(write.tensor, write.source,
                        [&](const Box& cell, uint32_t rank, uint32_t shard) {
                          copies.push_back({position, rank, shard, cell, TargetOf(write, cell)});
                        });
    }
    if (!std::is_sorted(copies.begin(), copies.end(), LandsBefore)) {
      std::sort(copies.begin(), copies.end(), LandsBefore);
    }
    for (const Copy& copy : copies) cutter.Add(copy);
  }
  return std::move(cutter).Finish();
}

}  // namespace weightd
