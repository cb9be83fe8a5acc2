#include "daemon/plan/tiling_index.h"

#include <algorithm>
#include <tuple>

#include "daemon/plan/tiling.h"

namespace weightd {
namespace {

constexpr char kMeshRemedy[] =
    "register every rank of the trainer group with the same mesh and placements; together their "
    "boxes must tile each tensor exactly once per replica group";

/// A dimension with this many indices per stripe is cut evenly enough.
constexpr int64_t kMinIndicesPerStripe = 8;

/// What one rank says it holds.
struct Claim {
  Box box;
  Holder holder;
};

std::string Text(const Claim& claim) {
  return fmt::format("rank {} {}", claim.holder.rank, ToString(claim.box));
}

Status Refuse(const char* reason, const TensorInfo& tensor, std::string rank, std::string message) {
  return MakeError(
      StatusCode::kInvalidArgument,
      fmt::format("{} tensor={} shape={}", message, tensor.name, ToString(tensor.shape)),
      {.reason = reason, .tensor = tensor.name, .rank = std::move(rank), .remedy = kMeshRemedy});
}

/// All nonempty boxes of one tensor.
StatusOr<std::vector<Claim>> Collect(const TensorInfo& tensor, uint32_t position,
                                     std::span<const RankShards> shards) {
  std::vector<Claim> claims;
  for (uint32_t rank = 0; rank < shards.size(); ++rank) {
    const RankShards& held = shards[rank];
    const uint32_t first = held.first[position];
    for (uint32_t i = first; i < held.first[position + 1]; ++i) {
      const Claim claim = {held.boxes[held.box_index[i]], {rank, i - first}};
      if (!FitsShape(claim.box, tensor.shape)) {
        return Refuse(reason::kShape, tensor, std::to_string(rank),
                      fmt::format("shard does not fit its tensor: {}", Text(claim)));
      }
      if (!claim.box.empty()) claims.push_back(claim);
    }
  }
  return claims;
}

/// Sorts equal boxes next to each other, ranks ascending.
void SortAlong(int sweep, std::vector<Claim>& claims) {
  std::sort(claims.begin(), claims.end(), [sweep](const Claim& a, const Claim& b) {
    for (int step = -1; step < a.box.num_dims(); ++step) {
      const int dim = step < 0 ? sweep : step;
      if (a.box.num_dims() == 0) break;
      const auto left = std::tuple(a.box.origin[dim], a.box.extent[dim]);
      const auto right = std::tuple(b.box.origin[dim], b.box.extent[dim]);
      if (left != right) return left < right;
    }
    return std::tuple(a.holder.rank, a.holder.shard) < std::tuple(b.holder.rank, b.holder.shard);
  });
}

/// Proves that the boxes of the first claims of each group tile the tensor.
Status CheckTiles(const TensorInfo& tensor, std::span<const Claim> claims,
                  std::span<const size_t> first) {
  std::vector<Box> boxes;
  int64_t elements = 0;
  for (size_t i : first) boxes.push_back(claims[i].box);
  if (const auto overlap = FindOverlap(boxes)) {
    const Claim& a = claims[first[overlap->first]];
    const Claim& b = claims[first[overlap->second]];
    return Refuse(reason::kOverlap, tensor, fmt::format("{},{}", a.holder.rank, b.holder.rank),
                  fmt::format("shards overlap without being replicas of each other: a={} b={}",
                              Text(a), Text(b)));
  }
  for (const Box& box : boxes) elements += box.num_elements();
  if (elements == NumElements(tensor.shape)) return absl::OkStatus();
  const std::optional<Box> gap = FindGap(tensor.shape, boxes);
  return Refuse(reason::kGap, tensor, "",
                fmt::format("elements of a tensor are held by no rank: box={}",
                            gap ? ToString(*gap) : "none"));
}

/// Where stripe `stripe` of `count` begins in `extent` indices.
int64_t StripeBegin(int64_t extent, uint32_t count, uint32_t stripe) {
  return extent / count * stripe + std::min<int64_t>(extent % count, stripe);
}

/// The dimension to cut a box into `count` stripes along: the outermost with enough indices, so
/// that stripes are contiguous, or else the longest. -1 if none has `count` indices.
int StripeDim(const Dims& extent, uint32_t count) {
  int longest = -1;
  for (int i = 0; i < extent.size(); ++i) {
    if (extent[i] >= kMinIndicesPerStripe * count) return i;
    if (extent[i] >= count && (longest < 0 || extent[i] > extent[longest])) longest = i;
  }
  return longest;
}

}  // namespace

StatusOr<TilingIndex> TilingIndex::Build(const TensorInfo& tensor, uint32_t position,
                                         std::span<const RankShards> shards,
                                         uint64_t min_stripe_bytes) {
  WEIGHTD_ASSIGN_OR_RETURN(std::vector<Claim> claims, Collect(tensor, position, shards));
  TilingIndex index;
  index.num_dims_ = static_cast<size_t>(tensor.shape.size());
  std::vector<Box> boxes;
  boxes.reserve(claims.size());
  for (const Claim& claim : claims) boxes.push_back(claim.box);
  index.sweep_ = SweepDim(boxes);
  SortAlong(index.sweep_, claims);
  std::vector<size_t> first;  // claim of each distinct box
  for (size_t i = 0; i < claims.size(); ++i) {
    if (i == 0 || claims[i].box != claims[i - 1].box) {
      first.push_back(i);
    } else if (claims[i].holder.rank == claims[i - 1].holder.rank) {
      return Refuse(reason::kOverlap, tensor, std::to_string(claims[i].holder.rank),
                    fmt::format("a rank holds the same shard twice: {}", Text(claims[i])));
    }
  }
  WEIGHTD_RETURN_IF_ERROR(CheckTiles(tensor, claims, first));
  first.push_back(claims.size());
  std::vector<Holder> holders;
  for (size_t i = 0; i + 1 < first.size(); ++i) {
    holders.clear();
    for (size_t j = first[i]; j < first[i + 1]; ++j) holders.push_back(claims[j].holder);
    index.AddPiece(claims[first[i]].box, holders, SizeBytes(tensor.dtype), min_stripe_bytes);
  }
  return index;
}

void TilingIndex::AddPiece(const Box& box, std::span<const Holder> holders, uint64_t element_bytes,
                           uint64_t min_stripe_bytes) {
  Piece piece;
  piece.first_holder = static_cast<uint32_t>(holders_.size());
  piece.num_holders = static_cast<uint32_t>(holders.size());
  if (piece.num_holders > 1) {
    piece.replicated = num_replicated_++;
    const uint64_t bytes = static_cast<uint64_t>(box.num_elements()) * element_bytes;
    if (bytes / piece.num_holders >= min_stripe_bytes) {
      piece.stripe_dim = static_cast<int8_t>(StripeDim(box.extent, piece.num_holders));
    }
  }
  pieces_.push_back(piece);
  holders_.insert(holders_.end(), holders.begin(), holders.end());
  for (int dim = 0; dim < box.num_dims(); ++dim) {
    bounds_.push_back(box.origin[dim]);
    bounds_.push_back(box.end(dim));
  }
  if (num_dims_ == 0) return;
  reach_.push_back(std::max(box.end(sweep_), reach_.empty() ? 0 : reach_.back()));
}

Box TilingIndex::box(size_t piece) const {
  Box box;
  for (int dim = 0; dim < static_cast<int>(num_dims_); ++dim) {
    box.origin.push_back(begin(piece, dim));
    box.extent.push_back(end(piece, dim) - begin(piece, dim));
  }
  return box;
}

int64_t TilingIndex::StripeElements(size_t piece, uint32_t stripe) const {
  const Piece& cut = pieces_[piece];
  const Box whole = box(piece);
  const int64_t extent = whole.extent[cut.stripe_dim];
  const int64_t indices = StripeBegin(extent, cut.num_holders, stripe + 1) -
                          StripeBegin(extent, cut.num_holders, stripe);
  return whole.num_elements() / extent * indices;
}

void TilingIndex::ForEachHolder(const Box& box, const uint32_t* turns, HolderFn fn) const {
  if (box.empty()) return;
  size_t piece = 0;
  if (num_dims_ > 0) {
    const auto reached = std::upper_bound(reach_.begin(), reach_.end(), box.origin[sweep_]);
    piece = static_cast<size_t>(std::distance(reach_.begin(), reached));
  }
  Box cell = box;
  for (; piece < pieces_.size(); ++piece) {
    if (num_dims_ > 0 && begin(piece, sweep_) >= box.end(sweep_)) break;
    bool meets = true;
    for (int dim = 0; meets && dim < cell.num_dims(); ++dim) {
      const int64_t from = std::max(box.origin[dim], begin(piece, dim));
      const int64_t to = std::min(box.end(dim), end(piece, dim));
      meets = from < to;
      cell.origin[dim] = from;
      cell.extent[dim] = to - from;
    }
    if (meets) EmitPiece(piece, cell, turns, fn);
  }
}

void TilingIndex::EmitPiece(size_t piece, const Box& cell, const uint32_t* turns,
                            HolderFn fn) const {
  const Piece& of = pieces_[piece];
  const Holder* holders = holders_.data() + of.first_holder;
  if (of.num_holders == 1) return fn(cell, holders[0].rank, holders[0].shard);
  const uint32_t turn = turns[of.replicated];
  if (of.stripe_dim < 0) return fn(cell, holders[turn].rank, holders[turn].shard);
  const int dim = of.stripe_dim;
  const int64_t origin = begin(piece, dim);
  const int64_t extent = end(piece, dim) - origin;
  Box part = cell;
  for (uint32_t stripe = 0; stripe < of.num_holders; ++stripe) {
    const int64_t from =
        std::max(cell.origin[dim], origin + StripeBegin(extent, of.num_holders, stripe));
    const int64_t to =
        std::min(cell.end(dim), origin + StripeBegin(extent, of.num_holders, stripe + 1));
    if (from >= to) continue;
    part.origin[dim] = from;
    part.extent[dim] = to - from;
    const Holder& holder = holders[(stripe + turn) % of.num_holders];
    fn(part, holder.rank, holder.shard);
  }
}

}  // namespace weightd
