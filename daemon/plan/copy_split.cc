#include "daemon/plan/copy_split.h"

#include <algorithm>

namespace weightd {
namespace {

/// Outermost dimension that can be cut; num_dims() if there is none.
int OuterDim(const Box& box) {
  int dim = 0;
  while (dim < box.num_dims() && box.extent[dim] == 1) ++dim;
  return dim;
}

}  // namespace

void SplitCopy(const Copy& copy, const Write& write, uint64_t element_bytes, uint64_t most_bytes,
               CopyList& list) {
  const uint64_t bytes = static_cast<uint64_t>(copy.target.num_elements()) * element_bytes;
  const int dim = bytes <= most_bytes ? copy.target.num_dims() : OuterDim(copy.target);
  if (dim == copy.target.num_dims()) {
    list.push_back(copy);
    return;
  }
  const int source_dim = write.zero_fill ? -1 : write.source_dim[static_cast<size_t>(dim)];
  const int64_t extent = copy.target.extent[dim];
  const uint64_t slice_bytes = bytes / static_cast<uint64_t>(extent);
  const auto step = static_cast<int64_t>(std::max<uint64_t>(1, most_bytes / slice_bytes));
  Copy part = copy;
  for (int64_t begin = 0; begin < extent; begin += step) {
    const int64_t indices = std::min(step, extent - begin);
    part.target.origin[dim] = copy.target.origin[dim] + begin;
    part.target.extent[dim] = indices;
    if (source_dim >= 0) {
      part.source.origin[source_dim] = copy.source.origin[source_dim] + begin;
      part.source.extent[source_dim] = indices;
    }
    SplitCopy(part, write, element_bytes, most_bytes, list);
  }
}

}  // namespace weightd
