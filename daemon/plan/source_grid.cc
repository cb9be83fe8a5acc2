#include <algorithm>
#include <unordered_map>

#include "daemon/layout/digest.h"
#include "daemon/plan/tiling_index.h"
#include "daemon/plan/transfer_plan.h"

namespace weightd {
namespace {

/// Proves that a rank's lists belong to the table, so that they may be indexed without checks.
Status CheckLists(const TensorTable& table, uint32_t rank, const RankShards& held) {
  const auto refuse = [rank](const std::string& message) {
    return MakeError(StatusCode::kInvalidArgument, message,
                     {.reason = reason::kTableMismatch,
                      .rank = std::to_string(rank),
                      .remedy = "register all ranks of the group with the same tensor table"});
  };
  if (held.first.size() != table.size() + 1 || held.first.front() != 0 ||
      held.first.back() != held.box_index.size()) {
    return refuse(fmt::format(
        "shards of a rank do not belong to the table: rank={} tensors={} "
        "table={} boxes={}",
        rank, held.first.empty() ? 0 : held.first.size() - 1, table.size(), held.box_index.size()));
  }
  if (!std::is_sorted(held.first.begin(), held.first.end())) {
    return refuse(fmt::format("shards of a rank are not listed in table order: rank={}", rank));
  }
  const auto greatest = std::max_element(held.box_index.begin(), held.box_index.end());
  if (greatest != held.box_index.end() && *greatest >= held.boxes.size()) {
    return refuse(fmt::format("shard refers to a box that is not listed: rank={} box={} of={}",
                              rank, *greatest, held.boxes.size()));
  }
  return absl::OkStatus();
}

/// One word per tensor that is equal for tensors that are cut alike.
std::vector<uint64_t> CutHashes(const TensorTable& table, std::span<const RankShards> shards) {
  std::vector<uint64_t> hashes(table.size());
  for (size_t t = 0; t < table.size(); ++t) {
    uint64_t hash = Mix64(static_cast<uint64_t>(table[t].dtype));
    for (int64_t size : table[t].shape) hash = Mix64(hash ^ static_cast<uint64_t>(size));
    hashes[t] = hash;
  }
  for (const RankShards& held : shards) {
    for (size_t t = 0; t < table.size(); ++t) {
      uint64_t hash = hashes[t] + held.first[t + 1] - held.first[t];
      for (uint32_t i = held.first[t]; i < held.first[t + 1]; ++i) {
        hash = (hash ^ held.box_index[i]) * 0x9e3779b97f4a7c15ULL;
        hash ^= hash >> 29;
      }
      hashes[t] = hash * 0xd6e8feb86659fd93ULL + 1;
    }
  }
  return hashes;
}

/// For every tensor the first one that is cut exactly alike.
std::vector<uint32_t> FindAlike(const TensorTable& table, std::span<const RankShards> shards) {
  const std::vector<uint64_t> hashes = CutHashes(table, shards);
  std::unordered_map<uint64_t, uint32_t> first_of_hash;
  std::vector<uint32_t> alike(table.size());
  for (uint32_t t = 0; t < table.size(); ++t) {
    const uint32_t other = first_of_hash.try_emplace(hashes[t], t).first->second;
    const bool same = table[other].dtype == table[t].dtype && table[other].shape == table[t].shape;
    alike[t] = same ? other : t;
  }
  // Equal hashes prove nothing: tensors that are not cut alike after all stand for themselves.
  for (const RankShards& held : shards) {
    const uint32_t* index = held.box_index.data();
    for (uint32_t t = 0; t < table.size(); ++t) {
      const uint32_t other = alike[t];
      if (other == t) continue;
      const bool same = std::equal(index + held.first[t], index + held.first[t + 1],
                                   index + held.first[other], index + held.first[other + 1]);
      if (!same) alike[t] = t;
    }
  }
  return alike;
}

/// Hands replicated boxes to their holders so that the bytes that ranks send stay even.
class ShareOut {
 public:
  explicit ShareOut(size_t num_ranks) : bytes_(num_ranks, 0) {}

  /// Counts the boxes that only one rank holds, in `tensors` tensors of one tiling.
  void AddFixed(const TilingIndex& tiling, uint64_t element_bytes, uint64_t tensors) {
    for (size_t i = 0; i < tiling.pieces().size(); ++i) {
      const TilingIndex::Piece& piece = tiling.pieces()[i];
      if (piece.num_holders > 1) continue;
      const auto elements = static_cast<uint64_t>(tiling.box(i).num_elements());
      bytes_[tiling.holders(piece)[0].rank] += elements * element_bytes * tensors;
    }
  }

  /// Chooses the turn of every replicated box of one tensor.
  void AddReplicated(const TilingIndex& tiling, uint64_t element_bytes,
                     std::vector<uint32_t>& turns) {
    for (size_t i = 0; i < tiling.pieces().size(); ++i) {
      const TilingIndex::Piece& piece = tiling.pieces()[i];
      if (piece.num_holders < 2) continue;
      const std::span<const Holder> holders = tiling.holders(piece);
      const auto least = std::min_element(
          holders.begin(), holders.end(),
          [this](const Holder& a, const Holder& b) { return bytes_[a.rank] < bytes_[b.rank]; });
      const auto turn = static_cast<uint32_t>(std::distance(holders.begin(), least));
      turns.push_back(turn);
      if (piece.stripe_dim < 0) {
        bytes_[least->rank] += static_cast<uint64_t>(tiling.box(i).num_elements()) * element_bytes;
        continue;
      }
      for (uint32_t stripe = 0; stripe < piece.num_holders; ++stripe) {
        bytes_[holders[(stripe + turn) % piece.num_holders].rank] +=
            static_cast<uint64_t>(tiling.StripeElements(i, stripe)) * element_bytes;
      }
    }
  }

 private:
  std::vector<uint64_t> bytes_;  ///< that each actor rank sends
};

}  // namespace

struct SourceGrid::Impl {
  std::vector<TilingIndex> tilings;
  std::vector<uint32_t> tiling_of;   ///< per tensor
  std::vector<uint64_t> first_turn;  ///< per tensor, into turns
  std::vector<uint32_t> turns;       ///< per replicated box of each tensor

  /// Finds or builds the tiling of every tensor.
  Status Intern(const TensorTable& table, std::span<const RankShards> shards,
                uint64_t min_stripe_bytes) {
    const std::vector<uint32_t> alike = FindAlike(table, shards);
    tiling_of.resize(table.size());
    for (uint32_t t = 0; t < table.size(); ++t) {
      if (alike[t] != t) {
        tiling_of[t] = tiling_of[alike[t]];
        continue;
      }
      WEIGHTD_ASSIGN_OR_RETURN(TilingIndex tiling,
                               TilingIndex::Build(table[t], t, shards, min_stripe_bytes));
      tiling_of[t] = static_cast<uint32_t>(tilings.size());
      tilings.push_back(std::move(tiling));
    }
    return absl::OkStatus();
  }

  void Share(const TensorTable& table, size_t num_ranks) {
    std::vector<uint64_t> tensors(tilings.size(), 0);
    std::vector<uint64_t> element_bytes(tilings.size(), 0);
    for (size_t t = 0; t < table.size(); ++t) {
      ++tensors[tiling_of[t]];
      element_bytes[tiling_of[t]] = SizeBytes(table[t].dtype);
    }
    ShareOut share(num_ranks);
    for (size_t i = 0; i < tilings.size(); ++i) {
      share.AddFixed(tilings[i], element_bytes[i], tensors[i]);
    }
    first_turn.resize(table.size());
    for (size_t t = 0; t < table.size(); ++t) {
      first_turn[t] = turns.size();
      const uint32_t tiling = tiling_of[t];
      if (tilings[tiling].num_replicated() == 0) continue;
      share.AddReplicated(tilings[tiling], element_bytes[tiling], turns);
    }
  }
};

SourceGrid::SourceGrid(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
SourceGrid::SourceGrid(SourceGrid&&) noexcept = default;
SourceGrid& SourceGrid::operator=(SourceGrid&&) noexcept = default;
SourceGrid::~SourceGrid() = default;

StatusOr<SourceGrid> SourceGrid::Build(const TensorTable& table, std::span<const RankShards> shards,
                                       uint64_t min_stripe_bytes) {
  for (uint32_t rank = 0; rank < shards.size(); ++rank) {
    WEIGHTD_RETURN_IF_ERROR(CheckLists(table, rank, shards[rank]));
  }
  auto impl = std::make_unique<Impl>();
  WEIGHTD_RETURN_IF_ERROR(impl->Intern(table, shards, min_stripe_bytes));
  impl->Share(table, shards.size());
  return SourceGrid(std::move(impl));
}

void SourceGrid::ForEachOwner(uint32_t tensor, const Box& box, OwnerFn fn) const {
  impl_->tilings[impl_->tiling_of[tensor]].ForEachHolder(
      box, impl_->turns.data() + impl_->first_turn[tensor], fn);
}

void SourceGrid::ForEachReplicated(absl::FunctionRef<void(const ReplicatedShard&)> fn) const {
  ReplicatedShard replicated;
  for (uint32_t t = 0; t < impl_->tiling_of.size(); ++t) {
    const TilingIndex& tiling = impl_->tilings[impl_->tiling_of[t]];
    if (tiling.num_replicated() == 0) continue;
    for (size_t i = 0; i < tiling.pieces().size(); ++i) {
      const TilingIndex::Piece& piece = tiling.pieces()[i];
      if (piece.num_holders < 2) continue;
      replicated.tensor = t;
      replicated.box = tiling.box(i);
      replicated.ranks.clear();
      replicated.shards.clear();
      for (const Holder& holder : tiling.holders(piece)) {
        replicated.ranks.push_back(holder.rank);
        replicated.shards.push_back(holder.shard);
      }
      fn(replicated);
    }
  }
}

std::vector<SourceGrid::ReplicatedShard> SourceGrid::Replicated() const {
  std::vector<ReplicatedShard> list;
  ForEachReplicated([&list](const ReplicatedShard& replicated) { list.push_back(replicated); });
  return list;
}

size_t SourceGrid::num_tilings() const { return impl_->tilings.size(); }

}  // namespace weightd
