// What the planner's tests share: trainers cut by DTensor's rules, and a checker that runs a plan
// element by element.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "daemon/plan/transfer_plan.h"

namespace weightd::testing {

/// A placement on one mesh dimension. dim < 0: Replicate.
struct Placement {
  int dim = -1;
  bool strided = false;  ///< _StridedShard: split after the Shards of the dimensions to its right
};
inline Placement Shard(int dim) { return {dim, false}; }
inline Placement StridedShard(int dim) { return {dim, true}; }
inline Placement Replicate() { return {}; }

/// Index i of `count` chunks of [0, size), as torch.chunk cuts it: [begin, end).
std::pair<int64_t, int64_t> Chunk(int64_t size, int64_t count, int64_t i);

/// The box that a rank holds; ranks fill the mesh row-major.
Box ShardOf(const Shape& shape, const std::vector<int>& mesh,
            const std::vector<Placement>& placements, int rank);

/// Number of ranks of a mesh.
int MeshSize(const std::vector<int>& mesh);

/// Collects what every rank holds, tensor by tensor.
class Trainer {
 public:
  explicit Trainer(int num_ranks) : shards_(static_cast<size_t>(num_ranks)) {
    for (RankShards& held : shards_) held.first.push_back(0);
  }

  /// Adds a tensor; boxes[r] are those of rank r. Returns its position.
  uint32_t Add(std::string name, Shape shape, DType dtype,
               const std::vector<std::vector<Box>>& boxes);
  /// The same for a DTensor.
  uint32_t Add(std::string name, Shape shape, const std::vector<int>& mesh,
               const std::vector<Placement>& placements, DType dtype = DType::kFloat32);

  const TensorTable& table() const { return table_; }
  const std::vector<RankShards>& shards() const { return shards_; }
  std::vector<RankShards>& shards() { return shards_; }
  StatusOr<SourceGrid> Grid(uint64_t min_stripe_bytes = kMinStripeBytes) const {
    return SourceGrid::Build(table_, shards_, min_stripe_bytes);
  }

 private:
  TensorTable table_;
  std::vector<RankShards> shards_;
};

/// A write whose dimensions follow the source's in order.
Write StraightWrite(uint32_t tensor, uint32_t param, Box source, Box target);
Write ZeroFill(uint32_t param, Box target);

/// Box with these bounds.
Box MakeBox(Dims origin, Dims extent);

/// Runs a plan element by element on memory that holds each element's own number, and compares the
/// outcome with the layout's writes, taken one element at a time. Also checks that every copy stays
/// inside the shard it names, that copies are in order and that windows obey their limits.
/// Returns what is wrong first, or an empty string.
std::string FaultOf(const TensorTable& table, std::span<const RankShards> shards,
                    const RankLayout& layout, const RankPlan& plan, const WindowLimits& limits);

/// Source bytes that every actor rank supplies to a plan.
std::vector<uint64_t> SentBytes(const TensorTable& table, size_t num_ranks,
                                const RankLayout& layout, const RankPlan& plan);

/// The reason of an error; empty for OK.
std::string ReasonOf(const Status& status);
template <typename T>
std::string ReasonOf(const StatusOr<T>& result) {
  return ReasonOf(result.status());
}

}  // namespace weightd::testing
