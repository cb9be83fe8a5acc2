// Do boxes tile a tensor? The two proofs that source shards and engine parameters share.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "daemon/layout/box.h"

namespace weightd {

/// True if a box has the tensor's number of dimensions, no negative numbers, and lies inside it,
/// also when it is empty. Safe for any input.
bool FitsShape(const Box& box, const Shape& shape);

/// The dimension along which most boxes begin at different places; 0 if there is none. Sweeps go
/// along it, because few boxes then meet at one place.
int SweepDim(std::span<const Box> boxes);

/// Positions of two boxes that have an element in common, the smaller first; nullopt if all are
/// disjoint. Empty boxes meet nothing. \pre equal dimensionality
std::optional<std::pair<size_t, size_t>> FindOverlap(std::span<const Box> boxes);

/// The first part (row-major, as a box) of a tensor that no box covers; nullopt if all is covered.
/// Boxes may overlap. \pre equal dimensionality
std::optional<Box> FindGap(const Shape& shape, std::span<const Box> boxes);

/// Adds a box to a union of boxes, growing one of its latest members where that is exact, so that
/// slices that arrive in order stay one box.
void AddToUnion(std::vector<Box>& boxes, const Box& box);

}  // namespace weightd
