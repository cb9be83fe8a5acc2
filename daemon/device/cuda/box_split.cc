#include "daemon/device/cuda/box_split.h"

#include <algorithm>
#include <utility>

#include "daemon/base/status.h"
#include "daemon/device/cuda/box_table.h"
#include "daemon/device/cuda/box_walk.h"

namespace weightd::cuda {
namespace {

constexpr uint64_t kVectorBytes = 16;
constexpr uint64_t kMostTiles = uint64_t{1} << 30;
constexpr uint64_t kMostExtent = uint64_t{1} << 31;
// What a block, or for single elements a warp, takes at a time: large beside the cost of reading a
// descriptor, small beside a GPU's share of the smallest model.
constexpr uint64_t kBlockBytes = 64 << 10;
constexpr uint64_t kDigestBytes = 256 << 10;  // a digest has nothing to write meanwhile
constexpr uint64_t kWarpBytes = 16 << 10;
constexpr uint32_t kWarp = 32;

bool Reads(const WideBox& box) { return box.desc.from_size != 0; }
bool Writes(const WideBox& box) { return box.desc.to_size != 0; }

void MoveToFront(std::vector<WideDim>& dims, size_t at, size_t place) {
  std::rotate(dims.begin() + static_cast<ptrdiff_t>(place),
              dims.begin() + static_cast<ptrdiff_t>(at),
              dims.begin() + static_cast<ptrdiff_t>(at) + 1);
}

template <typename Stride>
size_t Smallest(const std::vector<WideDim>& dims, Stride stride) {
  size_t best = 0;
  for (size_t d = 1; d < dims.size(); ++d) {
    if (stride(dims[d]) < stride(dims[best])) best = d;
  }
  return best;
}

// Brings the dimension(s) along which the kernel runs to the front; true: the tiles kernel.
bool OrderDims(WideBox& box) {
  std::vector<WideDim>& dims = box.dims;
  if (dims.empty()) dims.emplace_back();
  const size_t p = Smallest(dims, [](const WideDim& d) { return d.from; });
  size_t q = Smallest(dims, [](const WideDim& d) { return d.to; });
  if (!Reads(box)) {
    MoveToFront(dims, q, 0);
    return false;
  }
  if (!Writes(box)) {
    // A digest of transposed memory: rows of the source tensor run across memory.
    q = p;
    for (size_t d = 0; d < dims.size(); ++d) {
      if (box.desc.digest && dims[d].column != 0) q = d;
    }
  }
  MoveToFront(dims, p, 0);
  if (p == q || std::max(box.desc.from_size, box.desc.to_size) > kMostTileBytes) return false;
  MoveToFront(dims, q < p ? q + 1 : q, 1);
  return true;
}

// The box cut at `at` of dimension `d`: the first part stays, the second is returned.
WideBox CutOff(WideBox& box, size_t d, uint64_t at) {
  WideBox rest = box;
  WideDim& dim = rest.dims[d];
  dim.extent -= at;
  rest.desc.from_offset += at * dim.from;
  rest.desc.to_offset += at * dim.to;
  rest.desc.first_row += at * dim.row;
  rest.desc.first_column += at * dim.column;
  box.dims[d].extent = at;
  return rest;
}

void SetDims(const WideBox& box, BoxDesc& desc) {
  desc.num_dims = static_cast<uint8_t>(box.dims.size());
  for (size_t d = 0; d < box.dims.size(); ++d) {
    const WideDim& dim = box.dims[d];
    desc.dims[d] = {static_cast<uint32_t>(dim.extent), dim.column, dim.from, dim.to, dim.row};
  }
}

uint64_t CeilDiv(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

// True if every unit starts, on both sides and in the digest, at a multiple of a vector.
bool FitsVectors(const WideBox& box) {
  const BoxDesc& desc = box.desc;
  const uint64_t size = UnitSize(desc);
  const WideDim& fast = box.dims[0];
  if (fast.extent % (kVectorBytes / size) != 0) return false;
  const uint64_t source_vector = std::min(kVectorBytes, kVectorBytes / size * desc.from_size);
  if (Reads(box)) {
    if (fast.extent > 1 && fast.from != desc.from_size) return false;
    if (desc.from_offset % source_vector != 0) return false;
  }
  if (Writes(box)) {
    if (fast.extent > 1 && fast.to != desc.to_size) return false;
    if (desc.to_offset % kVectorBytes != 0) return false;
  }
  for (size_t d = 1; d < box.dims.size(); ++d) {
    if (Reads(box) && box.dims[d].from % source_vector != 0) return false;
    if (Writes(box) && box.dims[d].to % kVectorBytes != 0) return false;
    if (desc.digest && box.dims[d].column != 0) return false;
  }
  return !desc.digest || (fast.column == 1 && desc.first_column * size % kVectorBytes == 0);
}

void AppendTiles(const BoxDesc& desc, uint64_t tiles, BoxImage::Section& section) {
  WEIGHTD_CHECK(section.box_of_tile.size() + tiles <= kMostTiles);
  BoxDesc box = desc;
  box.first_tile = static_cast<uint32_t>(section.box_of_tile.size());
  section.box_of_tile.insert(section.box_of_tile.end(), tiles,
                             static_cast<uint32_t>(section.boxes.size()));
  section.boxes.push_back(box);
}

void AppendRows(const WideBox& box, BoxImage& image) {
  BoxDesc desc = box.desc;
  SetDims(box, desc);
  const uint64_t size = UnitSize(desc);
  const uint64_t per_part = kDigestBlockBytes / size;
  const uint64_t extent = box.dims[0].extent;
  const uint64_t column = box.dims[0].column != 0 ? desc.first_column % per_part : 0;
  const uint64_t first = std::min(extent, per_part - column);
  uint64_t rows = 1;
  for (size_t d = 1; d < box.dims.size(); ++d) rows *= box.dims[d].extent;
  desc.vectors = FitsVectors(box);
  desc.first_part = static_cast<uint32_t>(first);
  desc.parts = static_cast<uint32_t>(1 + CeilDiv(extent - first, per_part));
  desc.units = static_cast<uint32_t>(desc.parts * rows);
  const uint64_t longest = std::min(extent, per_part);
  const bool fast = desc.vectors && desc.kind <= BoxKind::kDigest;
  // Two vectors, or one element, per lane at least; then several units share a warp.
  const uint64_t wanted = fast ? longest * size / kVectorBytes / 2 : longest;
  uint32_t lanes = 1;
  while (lanes < kWarp && uint64_t{lanes} * 2 <= wanted) lanes *= 2;
  desc.lanes = static_cast<uint8_t>(lanes);
  const uint64_t tile_bytes = desc.kind == BoxKind::kDigest ? kDigestBytes : kBlockBytes;
  const uint64_t units = CeilDiv(fast ? tile_bytes : kWarpBytes, longest * size);
  desc.units_per_tile = static_cast<uint32_t>(CeilDiv(units, kWarp / lanes) * (kWarp / lanes));
  const int section = fast ? kVectorsSection + static_cast<int>(desc.kind) : kElementsSection;
  AppendTiles(desc, CeilDiv(desc.units, desc.units_per_tile),
              image.sections[static_cast<size_t>(section)]);
}

// True if a tile's rows and columns are whole vectors, aligned on the side that they run along.
bool FitsTileVectors(const WideBox& box) {
  const BoxDesc& desc = box.desc;
  const uint64_t vector = kTileVector;
  const WideDim& p = box.dims[0];
  const WideDim& q = box.dims[1];
  if (p.extent % vector != 0 || p.from != desc.from_size) return false;
  if (desc.from_offset % (vector * desc.from_size) != 0) return false;
  if (Writes(box) && (q.extent % vector != 0 || q.to != desc.to_size ||
                      desc.to_offset % (vector * desc.to_size) != 0)) {
    return false;
  }
  for (size_t d = 0; d < box.dims.size(); ++d) {
    if (d != 0 && box.dims[d].from % (vector * desc.from_size) != 0) return false;
    if (Writes(box) && d != 1 && box.dims[d].to % (vector * desc.to_size) != 0) return false;
  }
  return true;
}

void AppendTransposed(const WideBox& box, BoxImage& image) {
  BoxDesc desc = box.desc;
  SetDims(box, desc);
  uint64_t outer = 1;
  for (size_t d = 2; d < box.dims.size(); ++d) outer *= box.dims[d].extent;
  const uint64_t p_tiles = CeilDiv(box.dims[0].extent, kTileSide);
  const uint64_t q_tiles = CeilDiv(box.dims[1].extent, kTileLength);
  desc.parts = static_cast<uint32_t>(p_tiles);
  desc.first_part = static_cast<uint32_t>(q_tiles);
  desc.units = static_cast<uint32_t>(p_tiles * q_tiles * outer);
  desc.units_per_tile = 1;
  desc.vectors = FitsTileVectors(box);
  AppendTiles(desc, desc.units, image.sections[kTilesSection]);
}

// Cuts until everything fits into a descriptor. `front`: dimensions that the kernel runs along.
void AppendFitting(WideBox box, size_t front, BoxImage& image) {
  if (box.dims.size() > kDescDims) {
    size_t d = front;
    for (size_t i = front; i < box.dims.size(); ++i) {
      if (box.dims[i].extent < box.dims[d].extent) d = i;
    }
    while (true) {
      WideBox rest;
      const bool more = box.dims[d].extent > 1;
      if (more) rest = CutOff(box, d, 1);
      box.dims.erase(box.dims.begin() + static_cast<ptrdiff_t>(d));
      AppendFitting(std::move(box), front, image);
      if (!more) return;
      box = std::move(rest);
    }
  }
  uint64_t units = 1;
  size_t longest = 0;
  for (size_t d = 0; d < box.dims.size(); ++d) {
    units *= d == 0 ? CeilDiv(box.dims[0].extent, kTileSide) + 1 : box.dims[d].extent;
    if (box.dims[d].extent > box.dims[longest].extent) longest = d;
  }
  if (units > kMostTiles || box.dims[longest].extent > kMostExtent) {
    uint64_t at = box.dims[longest].extent / 2;
    if (at > kDigestBlockBytes) at -= at % kDigestBlockBytes;
    WideBox rest = CutOff(box, longest, at);
    AppendFitting(std::move(box), front, image);
    AppendFitting(std::move(rest), front, image);
    return;
  }
  if (front == 2) {
    AppendTransposed(box, image);
    return;
  }
  // What is left behind the last whole vector of the rows is a box of its own.
  const uint64_t rest = box.dims[0].extent % (kVectorBytes / UnitSize(box.desc));
  if (rest != 0 && rest != box.dims[0].extent) {
    WideBox whole = box;
    const WideBox tail = CutOff(whole, 0, box.dims[0].extent - rest);
    if (FitsVectors(whole)) {
      AppendRows(whole, image);
      AppendRows(tail, image);
      return;
    }
  }
  AppendRows(box, image);
}

bool Follow(const WideDim& outer, const WideDim& inner) {
  return outer.from == inner.extent * inner.from && outer.to == inner.extent * inner.to &&
         outer.row == inner.extent * inner.row && outer.column == 0 && inner.column == 0;
}

}  // namespace

void JoinDims(std::vector<WideDim>& dims) {
  for (size_t a = 0; a < dims.size(); ++a) {
    for (size_t b = 0; b < dims.size(); ++b) {
      if (a == b || !Follow(dims[a], dims[b])) continue;
      dims[b].extent *= dims[a].extent;
      dims.erase(dims.begin() + static_cast<ptrdiff_t>(a));
      return JoinDims(dims);
    }
  }
}

void AppendBox(WideBox box, BoxImage& image) {
  JoinDims(box.dims);
  const bool transposed = OrderDims(box);
  AppendFitting(std::move(box), transposed ? 2 : 1, image);
}

}  // namespace weightd::cuda
