// One tiling of a tensor by shards: which box holds an element, and which ranks hold that box.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/functional/function_ref.h"
#include "daemon/base/status.h"
#include "daemon/layout/tensor_layout.h"

namespace weightd {

/// A rank that holds a box; shard is the box's position among the rank's boxes of the tensor.
struct Holder {
  uint32_t rank = 0;
  uint32_t shard = 0;
};

/// The distinct boxes of one tensor, sorted along the dimension in which most of them are cut.
/// Thread safety: immutable after Build.
class TilingIndex {
 public:
  /// Proves that the nonempty boxes of `tensor` tile it exactly once, equal boxes of different
  /// ranks counting once. Errors as SourceGrid::Build.
  static StatusOr<TilingIndex> Build(const TensorInfo& tensor, uint32_t position,
                                     std::span<const RankShards> shards, uint64_t min_stripe_bytes);

  /// Calls fn(cell, rank, shard) for disjoint cells that together are `box`. turns[i] says which
  /// holder of the i-th replicated box comes first.
  using HolderFn = absl::FunctionRef<void(const Box&, uint32_t, uint32_t)>;
  void ForEachHolder(const Box& box, const uint32_t* turns, HolderFn fn) const;

  /// A distinct box and its holders, by ascending rank.
  struct Piece {
    uint32_t first_holder = 0;
    uint32_t num_holders = 0;
    uint32_t replicated = 0;  ///< position among the replicated boxes; meaningless for one holder
    int8_t stripe_dim = -1;   ///< >= 0: every holder supplies a stripe along this dimension
  };
  const std::vector<Piece>& pieces() const { return pieces_; }
  std::span<const Holder> holders(const Piece& piece) const {
    return std::span(holders_).subspan(piece.first_holder, piece.num_holders);
  }
  Box box(size_t piece) const;
  uint32_t num_replicated() const { return num_replicated_; }

  /// Elements that the holder of stripe `stripe` supplies. \pre the piece is cut into stripes
  int64_t StripeElements(size_t piece, uint32_t stripe) const;

 private:
  void AddPiece(const Box& box, std::span<const Holder> holders, uint64_t element_bytes,
                uint64_t min_stripe_bytes);
  void EmitPiece(size_t piece, const Box& cell, const uint32_t* turns, HolderFn fn) const;
  int64_t begin(size_t piece, int dim) const {
    return bounds_[2 * (piece * num_dims_ + static_cast<size_t>(dim))];
  }
  int64_t end(size_t piece, int dim) const {
    return bounds_[2 * (piece * num_dims_ + static_cast<size_t>(dim)) + 1];
  }

  size_t num_dims_ = 0;
  int sweep_ = 0;  ///< dimension along which the pieces are sorted
  uint32_t num_replicated_ = 0;
  std::vector<Piece> pieces_;
  std::vector<int64_t> bounds_;  ///< per piece and dimension: begin, end
  std::vector<int64_t> reach_;   ///< per piece: greatest end along sweep_ of it and all before
  std::vector<Holder> holders_;
};

}  // namespace weightd
