#include "daemon/plan/tiling.h"

#include <algorithm>
#include <numeric>

namespace weightd {
namespace {

/// How many of the latest members of a union are tried before a box is appended; bounds the cost of
/// adding n scattered boxes to O(n).
constexpr size_t kUnionLookBack = 64;

/// True if the boxes agree in all dimensions but `dim`, and touch or overlap there.
bool JoinableAlong(const Box& a, const Box& b, int dim) {
  for (int i = 0; i < a.num_dims(); ++i) {
    if (i == dim) {
      if (a.origin[i] > b.end(i) || b.origin[i] > a.end(i)) return false;
    } else if (a.origin[i] != b.origin[i] || a.extent[i] != b.extent[i]) {
      return false;
    }
  }
  return true;
}

/// Grows `into` to the union of both if that is a box.
bool TryJoin(Box& into, const Box& box) {
  for (int dim = 0; dim < box.num_dims(); ++dim) {
    if (!JoinableAlong(into, box, dim)) continue;
    const int64_t begin = std::min(into.origin[dim], box.origin[dim]);
    into.extent[dim] = std::max(into.end(dim), box.end(dim)) - begin;
    into.origin[dim] = begin;
    return true;
  }
  return false;
}

/// Looks for a gap in dimensions [dim, n), given the boxes that cover the chosen place in the
/// dimensions before; `gap` holds that place.
bool FindGapFrom(int dim, const Shape& shape, const std::vector<const Box*>& active, Box& gap) {
  if (active.empty()) {
    for (int i = dim; i < shape.size(); ++i) {
      gap.origin[i] = 0;
      gap.extent[i] = shape[i];
    }
    return true;
  }
  if (dim == shape.size()) return false;
  std::vector<int64_t> cuts = {0, shape[dim]};
  for (const Box* box : active) {
    cuts.push_back(box->origin[dim]);
    cuts.push_back(box->end(dim));
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  std::vector<const Box*> covering;
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    covering.clear();
    for (const Box* box : active) {
      if (box->origin[dim] <= cuts[i] && cuts[i + 1] <= box->end(dim)) covering.push_back(box);
    }
    gap.origin[dim] = cuts[i];
    gap.extent[dim] = cuts[i + 1] - cuts[i];
    if (FindGapFrom(dim + 1, shape, covering, gap)) return true;
  }
  return false;
}

}  // namespace

bool FitsShape(const Box& box, const Shape& shape) {
  if (box.origin.size() != shape.size() || box.extent.size() != shape.size()) return false;
  for (int i = 0; i < shape.size(); ++i) {
    if (box.origin[i] < 0 || box.extent[i] < 0 || box.extent[i] > shape[i] ||
        box.origin[i] > shape[i] - box.extent[i]) {
      return false;
    }
  }
  return true;
}

int SweepDim(std::span<const Box> boxes) {
  int best = 0;
  size_t best_count = 0;
  std::vector<int64_t> origins(boxes.size());
  for (int dim = 0; !boxes.empty() && dim < boxes.front().num_dims(); ++dim) {
    for (size_t i = 0; i < boxes.size(); ++i) origins[i] = boxes[i].origin[dim];
    std::sort(origins.begin(), origins.end());
    const auto count = static_cast<size_t>(
        std::distance(origins.begin(), std::unique(origins.begin(), origins.end())));
    if (count > best_count) {
      best = dim;
      best_count = count;
    }
  }
  return best;
}

std::optional<std::pair<size_t, size_t>> FindOverlap(std::span<const Box> boxes) {
  std::vector<size_t> order;
  for (size_t i = 0; i < boxes.size(); ++i) {
    if (!boxes[i].empty()) order.push_back(i);
  }
  if (order.size() < 2) return std::nullopt;
  if (boxes[order[0]].num_dims() == 0) return std::pair(order[0], order[1]);
  const int sweep = SweepDim(boxes);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return boxes[a].origin[sweep] < boxes[b].origin[sweep];
  });
  for (size_t i = 0; i < order.size(); ++i) {
    const Box& box = boxes[order[i]];
    for (size_t j = i + 1; j < order.size(); ++j) {
      if (boxes[order[j]].origin[sweep] >= box.end(sweep)) break;
      if (Intersect(box, boxes[order[j]]).empty()) continue;
      return std::pair(std::min(order[i], order[j]), std::max(order[i], order[j]));
    }
  }
  return std::nullopt;
}

std::optional<Box> FindGap(const Shape& shape, std::span<const Box> boxes) {
  if (NumElements(shape) == 0) return std::nullopt;
  std::vector<const Box*> active;
  for (const Box& box : boxes) {
    if (!box.empty()) active.push_back(&box);
  }
  Box gap = WholeBox(shape);
  if (FindGapFrom(0, shape, active, gap)) return gap;
  return std::nullopt;
}

void AddToUnion(std::vector<Box>& boxes, const Box& box) {
  if (box.empty()) return;
  const size_t look_back = std::min(boxes.size(), kUnionLookBack);
  for (size_t i = 0; i < look_back; ++i) {
    Box& member = boxes[boxes.size() - 1 - i];
    if (Contains(member, box)) return;
    if (Contains(box, member)) {
      member = box;
      return;
    }
    if (TryJoin(member, box)) return;
  }
  boxes.push_back(box);
}

}  // namespace weightd
