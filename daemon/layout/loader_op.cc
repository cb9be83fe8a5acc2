#include "daemon/layout/loader_op.h"

#include <algorithm>
#include <array>
#include <numeric>

namespace weightd {
namespace {

constexpr int64_t kVocabPadding = 64;

// Rows [src, src + len) of the source land at [dst, dst + len) of the parameter.
struct Piece {
  int64_t src = 0;
  int64_t dst = 0;
  int64_t len = 0;
};

// One dimension of the source as the op sees it (after T), and of the parameter.
struct Axis {
  std::vector<Piece> pieces;
  int64_t extent = 0;  // of the parameter
  int64_t filled = 0;  // parameter indices from here on are zero
};

template <typename... Args>
Status Indivisible(fmt::format_string<Args...> format, Args&&... args) {
  return Error(StatusCode::kInvalidArgument, reason::kDivisibility,
               "run the engine with a parallel size that divides the model", format,
               std::forward<Args>(args)...);
}

// The half-open part of `count` experts that rank `rank` of `size` holds: the first
// count % size ranks hold one more.
void ExpertRange(int64_t count, int size, int rank, int64_t* first, int64_t* held) {
  const int64_t base = count / size;
  const int64_t rest = count % size;
  *first = rank * base + std::min<int64_t>(rank, rest);
  *held = base + (rank < rest ? 1 : 0);
}

class Lowering {
 public:
  Lowering(const BoundOp& op, const EngineCoordinates& at) : op_(op), at_(at) {
    const int dims = op.source.size();
    for (int i = 0; i < dims; ++i) order_.push_back(i);
    if (op.transpose) {
      order_[dims - 1] = dims - 2;
      order_[dims - 2] = dims - 1;
    }
    for (int i = 0; i < dims; ++i) {
      const int64_t size = op.source[static_cast<int>(order_[i])];
      axes_[static_cast<size_t>(i)] = {{{0, 0, size}}, size, size};
    }
  }

  StatusOr<OpPlan> Run() {
    WEIGHTD_RETURN_IF_ERROR(Place());
    Permute();
    Emit();
    return std::move(plan_);
  }

 private:
  int64_t arg(size_t i) const { return op_.args[i]; }
  const std::string& text(size_t i) const { return op_.spec->main.args[i].text(); }
  Axis& axis(int dim) { return axes_[static_cast<size_t>(dim)]; }
  int dims() const { return op_.source.size(); }

  Status Place() {
    switch (op_.kind) {
      case OpKind::kCol:
        return Split(0, at_.tp_size, at_.tp_rank, arg(0));
      case OpKind::kRow:
        return Split(1, at_.tp_size, at_.tp_rank, arg(0));
      case OpKind::kVocab:
        return PlaceVocab();
      case OpKind::kGqa:
      case OpKind::kUnfuseGqa:
        return PlaceGqa();
      case OpKind::kKv:
        return PlaceKv();
      case OpKind::kMerge:
      case OpKind::kUnfuseMerge:
        return PlaceMerge(0, op_.args, at_.tp_size, at_.tp_rank);
      case OpKind::kReplicatedMerge:
        return PlaceMerge(0, op_.args, 1, 0);
      case OpKind::kMoe:
        return PlaceExpert();
      case OpKind::kMoe3:
        return PlaceExperts();
      default:
        return absl::OkStatus();
    }
  }

  // Keeps part `rank` of `parts` equal parts of a dimension, each a multiple of `unit`.
  Status Split(int dim, int parts, int rank, int64_t unit) {
    const int64_t size = axis(dim).extent;
    if (size % (unit * parts) != 0) {
      return Indivisible("dimension {} cannot be split: size={}, unit={}, tp={}", dim, size, unit,
                         parts);
    }
    const int64_t part = size / parts;
    axis(dim) = {{{rank * part, 0, part}}, part, part};
    return absl::OkStatus();
  }

  Status PlaceVocab() {
    const int64_t rows = arg(0);
    const int64_t padded = (rows + kVocabPadding - 1) / kVocabPadding * kVocabPadding;
    if (padded % at_.tp_size != 0) {
      return Indivisible("the padded vocabulary cannot be split: {}={}, padded={}, tp={}", text(0),
                         rows, padded, at_.tp_size);
    }
    const int64_t part = padded / at_.tp_size;
    const int64_t begin = std::min(at_.tp_rank * part, rows);
    const int64_t held = std::min((at_.tp_rank + 1) * part, rows) - begin;
    axis(0) = {{{begin, 0, held}}, part, held};
    return absl::OkStatus();
  }

  // How many query and key/value heads this rank holds, and which key/value group.
  struct Heads {
    int64_t q = 0;
    int64_t kv = 0;
    int64_t group = 0;
  };

  Status CheckKvHeads(int64_t heads, const std::string& name, Heads* out) const {
    const int tp = at_.tp_size;
    if (tp >= heads ? tp % heads != 0 : heads % tp != 0) {
      return Indivisible(
          "key/value heads can neither be split over nor repeated on the ranks: {}={}, tp={}", name,
          heads, tp);
    }
    out->kv = tp >= heads ? 1 : heads / tp;
    out->group = tp >= heads ? at_.tp_rank / (tp / heads) : at_.tp_rank;
    return absl::OkStatus();
  }

  Status PlaceGqa() {
    Heads heads;
    if (arg(0) % at_.tp_size != 0) {
      return Indivisible("query heads cannot be split: {}={}, tp={}", text(0), arg(0), at_.tp_size);
    }
    heads.q = arg(0) / at_.tp_size;
    WEIGHTD_RETURN_IF_ERROR(CheckKvHeads(arg(1), text(1), &heads));
    const int64_t dk = arg(2);
    const int64_t dv = arg(3);
    const std::array<int64_t, 3> whole = {arg(0) * dk, arg(1) * dk, arg(1) * dv};
    const std::array<int64_t, 3> local = {heads.q * dk, heads.kv * dk, heads.kv * dv};
    const std::array<int64_t, 3> part = {static_cast<int64_t>(at_.tp_rank), heads.group,
                                         heads.group};
    PlaceSlots(0, whole, local, part);
    return absl::OkStatus();
  }

  Status PlaceKv() {
    Heads heads;
    WEIGHTD_RETURN_IF_ERROR(CheckKvHeads(arg(0), text(0), &heads));
    const int64_t held = heads.kv * arg(1);
    axis(0) = {{{heads.group * held, 0, held}}, held, held};
    return absl::OkStatus();
  }

  Status PlaceMerge(int dim, std::span<const int64_t> sizes, int parts, int rank) {
    std::vector<int64_t> local;
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (sizes[i] % parts != 0) {
        return Indivisible("part {} of the merged parameter cannot be split: {}={}, tp={}", i,
                           op_.kind == OpKind::kMoe || op_.kind == OpKind::kMoe3 ? "Im" : text(i),
                           sizes[i], parts);
      }
      local.push_back(sizes[i] / parts);
    }
    PlaceSlots(dim, sizes, local, std::vector<int64_t>(sizes.size(), rank));
    return absl::OkStatus();
  }

  // The slots that the source fills, taken from where they stand in it: part[i] of slot i.
  void PlaceSlots(int dim, std::span<const int64_t> whole, std::span<const int64_t> local,
                  std::span<const int64_t> part) {
    Axis placed;
    int64_t src = 0;
    const bool both_experts = op_.kind == OpKind::kMoe3;
    const size_t begin = both_experts ? 0 : static_cast<size_t>(op_.slot_begin);
    const size_t end = both_experts ? whole.size() : static_cast<size_t>(op_.slot_end);
    for (size_t slot = 0; slot < whole.size(); ++slot) {
      if (slot >= begin && slot < end) {
        placed.pieces.push_back({src + part[slot] * local[slot], placed.extent, local[slot]});
        src += whole[slot];
      }
      placed.extent += local[slot];
    }
    placed.filled = placed.extent;
    axis(dim) = std::move(placed);
  }

  Status FindExperts(int64_t count) {
    if (count < at_.ep_size) {
      return Indivisible("fewer experts than expert-parallel ranks: E={}, ep={}", count,
                         at_.ep_size);
    }
    ExpertRange(count, at_.ep_size, at_.ep_rank, &plan_.first_expert, &plan_.num_experts);
    return absl::OkStatus();
  }

  // One expert's matrix: gate and up are stacked by rows, down is cut by columns.
  Status PlaceExpert() {
    plan_.per_expert = true;
    WEIGHTD_RETURN_IF_ERROR(FindExperts(arg(1)));
    const int parts = ExpertTpSize(at_);
    const int rank = parts == 1 ? 0 : at_.tp_rank;
    if (op_.slot_begin == 2) return Split(1, parts, rank, 1);
    return PlaceMerge(0, std::array<int64_t, 2>{arg(2), arg(2)}, parts, rank);
  }

  // All experts in one tensor, dimension 0 counting them.
  Status PlaceExperts() {
    WEIGHTD_RETURN_IF_ERROR(FindExperts(arg(1)));
    axis(0) = {{{plan_.first_expert, 0, plan_.num_experts}}, plan_.num_experts, plan_.num_experts};
    const int parts = ExpertTpSize(at_);
    const int rank = parts == 1 ? 0 : at_.tp_rank;
    switch (op_.slot_begin) {
      case 0:
        return PlaceMerge(1, std::array<int64_t, 2>{arg(2), arg(2)}, parts, rank);
      case 1:
        return Split(2, parts, rank, 1);
      case 2:
        return Split(1, parts, rank, arg(0));
      case 3:
        return Split(2, parts, rank, arg(0));
      case 5:
        if (rank != 0) axis(0) = {{}, plan_.num_experts, 0};
        return absl::OkStatus();
      default:
        return absl::OkStatus();
    }
  }

  // The row of the source that stands at row `row` of the order the placing op sees.
  int64_t PhysicalRow(int64_t row) const {
    const std::vector<int64_t>& a = op_.permutation_args;
    if (op_.permutation == OpKind::kRope) {
      const int64_t in_head = row % a[0];
      const int64_t half = a[0] / 2;
      return row - in_head + (in_head % half) * 2 + in_head / half;
    }
    const int64_t heads_per_group = a[0] / a[1];
    const int64_t head = row / a[2];
    const int64_t group = head < a[0]          ? head / heads_per_group
                          : head < a[0] + a[1] ? head - a[0]
                                               : head - a[0] - a[1];
    const int64_t in_group = head < a[0]          ? head % heads_per_group
                             : head < a[0] + a[1] ? heads_per_group
                                                  : heads_per_group + 1;
    return (group * (heads_per_group + 2) + in_group) * a[2] + row % a[2];
  }

  void Permute() {
    if (op_.permutation == OpKind::kSkip) return;
    std::vector<Piece> runs;
    for (const Piece& piece : axis(0).pieces) {
      for (int64_t i = 0; i < piece.len; ++i) {
        const int64_t src = PhysicalRow(piece.src + i);
        const int64_t dst = piece.dst + i;
        if (!runs.empty() && runs.back().src + runs.back().len == src &&
            runs.back().dst + runs.back().len == dst) {
          ++runs.back().len;
        } else {
          runs.push_back({src, dst, 1});
        }
      }
    }
    axis(0).pieces = std::move(runs);
  }

  void Emit() {
    const int shift = plan_.per_expert ? 1 : 0;
    if (plan_.per_expert) plan_.param.push_back(plan_.num_experts);
    for (int i = 0; i < dims(); ++i) plan_.param.push_back(axis(i).extent);
    if (dims() > 0 && axis(0).filled < axis(0).extent) EmitZeros();

    Write write;
    write.source_dim.fill(-1);
    if (shift == 1) {
      write.target.origin.push_back(0);
      write.target.extent.push_back(1);
    }
    write.source.origin = write.source.extent = Dims::Filled(dims(), 0);
    for (int i = 0; i < dims(); ++i) {
      write.source_dim[static_cast<size_t>(i) + static_cast<size_t>(shift)] =
          static_cast<int8_t>(order_[i]);
      write.target.origin.push_back(0);
      write.target.extent.push_back(0);
    }
    EmitFrom(0, shift, &write);
    for (const Write& one : plan_.writes) plan_.num_elements += one.target.num_elements();
  }

  void EmitZeros() {
    Write zero;
    zero.zero_fill = true;
    zero.source_dim.fill(-1);
    zero.target = WholeBox(plan_.param);
    zero.target.origin[0] = axis(0).filled;
    zero.target.extent[0] = axis(0).extent - axis(0).filled;
    if (!zero.target.empty()) plan_.writes.push_back(zero);
  }

  // The product of the axes' pieces.
  void EmitFrom(int dim, int shift, Write* write) {
    if (dim == dims()) {
      plan_.writes.push_back(*write);
      return;
    }
    const int source = static_cast<int>(order_[dim]);
    for (const Piece& piece : axis(dim).pieces) {
      if (piece.len == 0) continue;
      write->source.origin[source] = piece.src;
      write->source.extent[source] = piece.len;
      write->target.origin[dim + shift] = piece.dst;
      write->target.extent[dim + shift] = piece.len;
      EmitFrom(dim + 1, shift, write);
    }
  }

  const BoundOp& op_;
  const EngineCoordinates at_;
  Dims order_;  // source dimension of each dimension of the view
  std::array<Axis, kMaxDims> axes_;
  OpPlan plan_;
};

}  // namespace

int ExpertTpSize(const EngineCoordinates& coordinates) {
  return coordinates.ep_size > 1 ? 1 : coordinates.tp_size;
}

StatusOr<OpPlan> LowerOp(const BoundOp& op, const EngineCoordinates& coordinates) {
  return Lowering(op, coordinates).Run();
}

}  // namespace weightd
