#include "client/ctl/pure/layout_runs.h"

#include <algorithm>

namespace weightd {
namespace {

// The rows (innermost target dimension) of one write.
void AddRows(const Write& write, const Shape& param, const TensorTable& table,
             std::vector<Run>* runs) {
  if (write.target.empty()) return;
  const int dims = write.target.num_dims();
  const Dims target_strides = RowMajorStrides(param);
  const Dims source_strides =
      write.zero_fill ? Dims::Filled(dims, 0) : RowMajorStrides(table[write.tensor].shape);
  Dims steps = Dims::Filled(dims, 0);  // source elements per step of each target dimension
  int64_t start = 0;
  if (!write.zero_fill) {
    for (int i = 0; i < write.source.num_dims(); ++i) {
      start += write.source.origin[i] * source_strides[i];
    }
    for (int i = 0; i < dims; ++i) {
      const auto from = write.source_dim[static_cast<size_t>(i)];
      if (from >= 0) steps[i] = source_strides[from];
    }
  }
  Dims at = Dims::Filled(dims, 0);
  const int64_t length = dims == 0 ? 1 : write.target.extent[dims - 1];
  while (true) {
    Run run{0, length, write.zero_fill ? -1 : static_cast<int64_t>(write.tensor), start, 0};
    for (int i = 0; i < dims; ++i) {
      run.offset += (write.target.origin[i] + at[i]) * target_strides[i];
      run.start += at[i] * steps[i];
    }
    if (!write.zero_fill) run.stride = dims == 0 || length == 1 ? 1 : steps[dims - 1];
    runs->push_back(run);
    int dim = dims - 2;
    while (dim >= 0 && ++at[dim] == write.target.extent[dim]) at[dim--] = 0;
    if (dim < 0) return;
  }
}

// Appends `next`, which begins where the last run ends, so that the result is what a reader gets
// who extends each run element by element for as long as its stride holds.
void Append(Run next, std::vector<Run>* merged) {
  while (next.length > 0) {
    if (merged->empty() || merged->back().source != next.source) {
      merged->push_back(next);
      return;
    }
    Run& last = merged->back();
    if (next.source < 0) {
      last.length += next.length;
      return;
    }
    if (last.length == 1) last.stride = next.start - last.start;
    if (next.start != last.start + last.length * last.stride) {
      if (last.length == 1) last.stride = 1;
      merged->push_back(next);
      return;
    }
    const int64_t taken = next.length == 1 || next.stride == last.stride ? next.length : 1;
    last.length += taken;
    next.offset += taken;
    next.start += taken * next.stride;
    next.length -= taken;
    if (next.length == 1) next.stride = 1;
    if (next.length > 0) {
      // The rest goes on with another stride: it cannot extend `last` again.
      merged->push_back(next);
      return;
    }
  }
}

StatusOr<std::vector<Run>> Merge(const ParamInfo& param, std::vector<Run> rows) {
  std::sort(rows.begin(), rows.end(),
            [](const Run& a, const Run& b) { return a.offset < b.offset; });
  std::vector<Run> merged;
  int64_t next = 0;
  rows.push_back({.offset = NumElements(param.shape)});
  for (const Run& row : rows) {
    if (row.offset != next) {
      const bool gap = row.offset > next;
      return MakeError(
          StatusCode::kInternal,
          fmt::format("the loader leaves {} in a parameter: param={}, offset={}, next={}",
                      gap ? "a gap" : "an overlap", param.name, next, row.offset),
          {.reason = gap ? reason::kGap : reason::kOverlap,
           .tensor = param.name,
           .remedy = "correct the loader's rules"});
    }
    Append(row, &merged);
    next += row.length;
  }
  return merged;
}

}  // namespace

StatusOr<std::vector<std::vector<Run>>> RunsOf(const RankLayout& layout, const TensorTable& table) {
  std::vector<std::vector<Run>> rows(layout.params.size());
  for (const Write& write : layout.writes) {
    AddRows(write, layout.params[write.param].shape, table, &rows[write.param]);
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    WEIGHTD_ASSIGN_OR_RETURN(rows[i], Merge(layout.params[i], std::move(rows[i])));
  }
  return rows;
}

}  // namespace weightd
