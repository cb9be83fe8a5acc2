// Integer expressions of rule files: symbols, config fields, captures, arithmetic, conditions.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/status.h"

namespace weightd {

/// What an expression reads from. Names are symbols ("nq"), config fields ("config.head_dim",
/// dots descend) or captures ("#l").
class Scope {
 public:
  virtual ~Scope() = default;
  /// The value; nullopt if a config field is absent or null. \error if the name has no value
  virtual StatusOr<std::optional<int64_t>> Lookup(std::string_view name) const = 0;
  /// Size of dimension `dim` of the first source tensor whose name matches `pattern`; 0 if no
  /// tensor does or it has fewer dimensions.
  virtual StatusOr<std::optional<int64_t>> Size(std::string_view pattern, int dim) const = 0;
};

/// A parsed expression. Grammar, loosest first: `a else b` (b if a reads an absent config field),
/// `or`, `and`, comparisons, `+ -`, `* / %` (division rounds down), then integers, names, (a),
/// not(a), pick(condition, a, b), size(pattern, dim). Conditions yield 1 or 0.
/// Thread safety: immutable.
class Expression {
 public:
  /// \error INVALID_ARGUMENT with a message that does not name a file
  static StatusOr<Expression> Parse(std::string_view text);

  /// \error INVALID_ARGUMENT CONFIG if a field is absent or a divisor is zero
  StatusOr<int64_t> Evaluate(const Scope& scope) const;

  const std::string& text() const { return text_; }
  /// Every name that it reads, in order of appearance.
  const std::vector<std::string>& names() const { return names_; }
  bool reads_captures() const;
  bool reads_sizes() const { return reads_sizes_; }

 private:
  friend class ExpressionParser;
  enum class Kind : uint8_t { kNumber, kName, kNot, kPick, kSize, kBinary };
  struct Node {
    Kind kind = Kind::kNumber;
    std::string op;  // binary operator, name, or size()'s pattern
    int64_t number = 0;
    int a = -1;
    int b = -1;
    int c = -1;
  };
  using Value = StatusOr<std::optional<int64_t>>;

  Value EvaluateNode(int index, const Scope& scope) const;
  Value EvaluateBinary(const Node& node, const Scope& scope) const;

  std::string text_;
  std::vector<Node> nodes_;
  std::vector<std::string> names_;
  int root_ = -1;
  bool reads_sizes_ = false;
};

}  // namespace weightd
