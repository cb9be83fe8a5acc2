// What an engine rank saw its own loader do, for models without a rule file: blocks by the sources'
// names. Lowered to a RankLayout once the trainer's tensors are known; the coverage proof is that
// of every layout.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/layout/tensor_layout.h"

namespace weightd {

/// Shown where the rule file of a replica would be.
inline constexpr char kTracedOrigin[] = "traced";

/// A source tensor that the loader was fed.
struct TracedSource {
  std::string name;
  Shape shape;
  bool used = false;  ///< some write of this rank reads it
  bool operator==(const TracedSource&) const = default;
};

/// The trace of one engine rank.
/// \invariant made by Create: positions are in range, names are unique
class TracedLayout {
 public:
  /// `writes` refer to `sources` (Write::tensor) and to `params` by position. Sets `used`.
  /// \error INVALID_ARGUMENT PROTOCOL for a position out of range, DUPLICATE_TENSOR for a name that
  /// is there twice
  static StatusOr<std::shared_ptr<const TracedLayout>> Create(std::vector<TracedSource> sources,
                                                              std::vector<Write> writes,
                                                              size_t num_params);

  const std::vector<TracedSource>& sources() const { return sources_; }
  const std::vector<Write>& writes() const { return writes_; }
  /// XXH3-128 of sources and writes.
  const std::array<uint8_t, 16>& digest() const { return digest_; }

 private:
  TracedLayout(std::vector<TracedSource> sources, std::vector<Write> writes);

  std::vector<TracedSource> sources_;
  std::vector<Write> writes_;
  std::array<uint8_t, 16> digest_{};
};

/// Binds the traces of one replica's ranks to the trainer's tensors.
class TraceBinder {
 public:
  /// `table` outlives this.
  explicit TraceBinder(const TensorTable& table);

  /// The layout of a rank that registered `params`.
  /// \error INVALID_ARGUMENT MISSING_TENSOR / SHAPE naming a tensor that the trace reads
  StatusOr<RankLayout> Lower(const TracedLayout& trace, const EngineCoordinates& coordinates,
                             std::span<const ParamInfo> params);

  /// The trainer's tensors that every lowered rank left out, ascending. Call after the last Lower.
  /// \error INVALID_ARGUMENT UNKNOWN_TENSOR naming a tensor that no trace was fed
  StatusOr<std::vector<uint32_t>> Skipped() const;

 private:
  enum class Seen : uint8_t { kNever, kSkipped, kUsed };

  const TensorTable& table_;
  std::unordered_map<std::string_view, uint32_t> positions_;
  std::vector<Seen> seen_;  // per tensor of the table
  std::vector<std::string> fed_;
};

}  // namespace weightd
