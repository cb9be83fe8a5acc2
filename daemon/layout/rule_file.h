// A parsed rule file. The format is described in loaders/README.md.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/layout/expression.h"
#include "daemon/layout/loader_op.h"
#include "daemon/layout/name_pattern.h"

namespace weightd {

/// One line `<pattern> -> <target> : <ops> [optional] [if=<expression>]`.
struct Rule {
  int line = 0;
  NamePattern pattern;
  TargetPattern target;  ///< unused by rules that skip
  RuleOps ops;
  std::optional<Expression> condition;
  bool optional = false;           ///< an engine may lack the parameter
  int phase = 0;                   ///< place of the rule's parameters in layer order
  bool ops_read_captures = false;  ///< arguments other than an expert's number depend on captures

  bool skips() const { return ops.main.kind == OpKind::kSkip; }
};

/// A named integer of the model, from its config.
struct SymbolDefinition {
  int line = 0;
  std::string name;
  Expression value;
};

/// A condition on sizes that the engine itself insists on.
struct Requirement {
  int line = 0;
  Expression condition;
};

struct RuleFile {
  std::string name;
  std::string origin;
  std::vector<std::string> architectures;
  std::vector<std::string> profiles;
  std::vector<SymbolDefinition> symbols;
  std::vector<Requirement> requirements;
  std::string
      head;  ///< the engine's output head, whose presence decides the symbol `tie`; or empty
  std::vector<Rule> rules;

  /// \error INVALID_ARGUMENT RULE_FILE with origin:line
  static StatusOr<RuleFile> Parse(std::string_view text, std::string origin);
};

/// Symbols of `require` lines that the engine rank gives: its parallel sizes.
inline constexpr std::string_view kRankSymbols[] = {"tp", "ep", "pp"};

}  // namespace weightd
