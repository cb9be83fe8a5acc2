// The numbers that a rule file's expressions see: symbols, config fields, captures, tensor sizes.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/layout/expression.h"
#include "daemon/layout/name_pattern.h"
#include "daemon/layout/rule_file.h"
#include "daemon/layout/tensor_layout.h"

namespace weightd {

/// The symbols of one model. A symbol whose config field is missing is an error only when it is
/// used. Thread safety: immutable after Evaluate.
class Symbols {
 public:
  /// Evaluates the file's symbols. `config_json` is the model's Hugging Face config.
  /// \error INVALID_ARGUMENT CONFIG if it is not a JSON object
  static StatusOr<Symbols> Evaluate(const RuleFile& file, std::string_view config_json,
                                    const TensorTable& table);

  /// \error INVALID_ARGUMENT CONFIG if the symbol has no value
  StatusOr<int64_t> Get(std::string_view name) const;
  /// Replaces a symbol's value.
  void Set(std::string_view name, int64_t value);

 private:
  std::vector<std::pair<std::string, StatusOr<int64_t>>> values_;
};

/// Symbols plus the captures of one match.
class RuleScope : public Scope {
 public:
  RuleScope(const Symbols& symbols, const NamePattern* pattern, const Captures* captures)
      : symbols_(symbols), pattern_(pattern), captures_(captures) {}

  StatusOr<std::optional<int64_t>> Lookup(std::string_view name) const override;
  StatusOr<std::optional<int64_t>> Size(std::string_view pattern, int dim) const override;

 private:
  const Symbols& symbols_;
  const NamePattern* pattern_;
  const Captures* captures_;
};

/// Symbols plus an engine rank's parallel sizes.
class RankScope : public Scope {
 public:
  RankScope(const Symbols& symbols, const EngineCoordinates& coordinates)
      : symbols_(symbols), coordinates_(coordinates) {}

  StatusOr<std::optional<int64_t>> Lookup(std::string_view name) const override;
  StatusOr<std::optional<int64_t>> Size(std::string_view pattern, int dim) const override;

 private:
  const Symbols& symbols_;
  const EngineCoordinates coordinates_;
};

}  // namespace weightd
