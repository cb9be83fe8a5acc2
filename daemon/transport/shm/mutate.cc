#include "daemon/transport/shm/mutate.h"

#ifdef WEIGHTD_FAILPOINTS
#include <algorithm>
#include <utility>

#include "daemon/base/failpoint.h"

namespace weightd {
namespace {

/// Calls `change` with the first two copies that have the same shape.
template <typename Change>
void ForTwins(std::vector<BlockItem>& items, Change&& change) {
  for (size_t i = 0; i < items.size(); ++i) {
    for (size_t j = i + 1; j < items.size(); ++j) {
      BlockItem& a = items[i];
      BlockItem& b = items[j];
      if (a.zero_fill || b.zero_fill || a.to.extent != b.to.extent || a.to.dtype != b.to.dtype ||
          a.from.dtype != b.from.dtype) {
        continue;
      }
      return change(a, b);
    }
  }
}

/// Lets the first copy that has several rows begin one row late.
void BeginLate(std::vector<BlockItem>& items) {
  for (BlockItem& item : items) {
    if (item.zero_fill || item.to.extent.empty() || item.to.extent[0] < 2) continue;
    --item.to.extent[0];
    --item.from.extent[0];
    item.to.base += item.to.strides[0] * static_cast<int64_t>(SizeBytes(item.to.dtype));
    item.from.base += item.from.strides[0] * static_cast<int64_t>(SizeBytes(item.from.dtype));
    ++item.position.origin[0];
    return;
  }
}

}  // namespace

void MutateItems(std::vector<BlockItem>& items) {
  if (items.empty()) return;
  if (Mutated("skip_tensor")) {
    const uint64_t tensor = items.front().position.tensor;
    std::erase_if(items, [tensor](const BlockItem& item) {
      return !item.zero_fill && item.position.tensor == tensor;
    });
  }
  if (Mutated("skip_zeros")) {
    std::erase_if(items, [](const BlockItem& item) { return item.zero_fill; });
  }
  if (Mutated("swap_boxes")) {
    ForTwins(items, [](BlockItem& a, BlockItem& b) { std::swap(a.to, b.to); });
  }
  if (Mutated("swap_sources")) {
    ForTwins(items, [](BlockItem& a, BlockItem& b) { std::swap(a.from, b.from); });
  }
  if (Mutated("off_by_one")) BeginLate(items);
}

void MutateDigests(RankDigests& digests) {
  if (!Mutated("drop_digest") || digests.tensors.empty()) return;
  digests.tensors.erase(digests.tensors.begin());
  digests.words.erase(digests.words.begin());
}

}  // namespace weightd
#endif
