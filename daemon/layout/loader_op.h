// The operations of rule files: what each makes of a source tensor on one engine rank. The table in
// loaders/README.md lists them with examples.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/layout/expression.h"
#include "daemon/layout/name_pattern.h"
#include "daemon/layout/tensor_layout.h"

namespace weightd {

enum class OpKind : uint8_t {
  kSkip,
  kRep,
  kCol,
  kRow,
  kVocab,
  kGqa,
  kUnfuseGqa,
  kKv,
  kMerge,
  kReplicatedMerge,
  kUnfuseMerge,
  kMoe,
  kMoe3,
  kTranspose,
  kRope,
  kGrouped,
};

/// One operation as written, defaults filled in.
struct OpSpec {
  OpKind kind = OpKind::kSkip;
  std::string text;
  std::vector<Expression> args;
  std::string slot;  ///< after the dot: "q", "0", "0-2", "$1"; empty if the op has none
};

/// The right-hand side of a rule: at most one `T`, at most one row permutation, one placing op.
struct RuleOps {
  bool transpose = false;
  std::vector<OpSpec> permutation;  ///< empty or one
  OpSpec main;
};

/// Parses "T unfuse-gqa". \error INVALID_ARGUMENT with a message that does not name a file
StatusOr<RuleOps> ParseOps(std::string_view text, const NamePattern& pattern);

/// An operation with numbers for one shape of source tensor.
struct BoundOp {
  OpKind kind = OpKind::kRep;
  bool transpose = false;
  std::vector<int64_t> args;
  int slot_begin = 0;  ///< slots [begin, end) of the parameter that the source fills
  int slot_end = 1;
  OpKind permutation = OpKind::kSkip;  ///< kSkip: none
  std::vector<int64_t> permutation_args;
  Shape source;
  const RuleOps* spec = nullptr;  ///< for errors; outlives this
};

/// Evaluates the arguments and compares the source's shape with what they imply.
/// \error INVALID_ARGUMENT SHAPE / CONFIG
StatusOr<BoundOp> BindOp(const RuleOps& ops, const NamePattern& pattern, const Captures& captures,
                         const Shape& source, const Scope& scope);

/// What a bound operation does on one rank, for any tensor that shares it.
struct OpPlan {
  Shape param;                ///< local shape of the parameter
  std::vector<Write> writes;  ///< tensor and param are left 0
  int64_t num_elements = 0;   ///< parameter elements that one source covers, zero fill included
  bool per_expert = false;    ///< the source is one expert: target dimension 0 is its slot
  int64_t first_expert = 0;   ///< experts [first, first + count) live on this rank
  int64_t num_experts = 0;
};

/// Parts into which experts' matrices are cut: tp, or 1 if whole experts are spread by ep.
int ExpertTpSize(const EngineCoordinates& coordinates);

/// \error INVALID_ARGUMENT DIVISIBILITY naming the sizes that do not fit
StatusOr<OpPlan> LowerOp(const BoundOp& op, const EngineCoordinates& coordinates);

}  // namespace weightd
