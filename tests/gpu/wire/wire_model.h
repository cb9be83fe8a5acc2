// A trainer rank on one device and a TP 1 engine rank on another, without memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "daemon/plan/wire_schedule.h"
#include "daemon/transport/transport.h"

namespace weightd {

/// Shapes of a model in a trainer's dtype and, merged, in an engine's bfloat16. Tensors and
/// parameters lie one behind the other. Not movable.
class WireModel {
 public:
  /// `name`: "llama" (Llama-3.1-8B) or "moe" (Qwen3-30B-A3B with 8 of 48 layers).
  WireModel(std::string_view name, DType source);
  WireModel(const WireModel&) = delete;
  WireModel& operator=(const WireModel&) = delete;

  uint64_t source_bytes() const { return source_bytes_; }
  uint64_t landed_bytes() const { return landed_bytes_; }
  /// The part of device "0", which sends, or "1", which receives.
  WireSchedule Schedule(std::string_view device, uint64_t staging) const;
  /// \pre `source` and `target` have those bytes, or are nullptr: the memory is another device's
  BoundPlan Bind(std::byte* source, std::byte* target) const;

 private:
  /// A parameter of these rows, merged from tensors of so many each.
  void Param(int64_t columns, std::vector<int64_t> rows);
  void Attention(int64_t hidden, int64_t query, int64_t key_value);

  const DType source_;
  TensorTable table_;
  std::vector<RankShards> shards_{1};
  RankLayout layout_;
  std::optional<SourceGrid> grid_;
  std::vector<RankPlan> plans_;
  std::vector<uint64_t> source_offsets_;  ///< per tensor
  std::vector<uint64_t> target_offsets_;  ///< per parameter
  uint64_t source_bytes_ = 0;
  uint64_t landed_bytes_ = 0;
};

}  // namespace weightd
