#include "daemon/layout/model_scope.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

namespace weightd {
namespace {

constexpr char kRemedy[] = "give the model's complete Hugging Face config";
using Value = StatusOr<std::optional<int64_t>>;

// The number at "config.a.b"; nullopt if it or something above it is absent or null.
Value ConfigField(const nlohmann::json& config, std::string_view name) {
  const nlohmann::json* node = &config;
  std::string_view path = name.substr(std::string_view("config.").size());
  while (true) {
    const size_t dot = path.find('.');
    if (!node->is_object()) return std::optional<int64_t>();
    const auto found = node->find(std::string(path.substr(0, dot)));
    if (found == node->end() || found->is_null()) return std::optional<int64_t>();
    node = &*found;
    if (dot == std::string_view::npos) break;
    path.remove_prefix(dot + 1);
  }
  if (node->is_boolean()) return std::optional<int64_t>(node->get<bool>() ? 1 : 0);
  if (node->is_number_integer()) return std::optional<int64_t>(node->get<int64_t>());
  if (node->is_number_float()) {
    const double value = node->get<double>();
    if (value == std::floor(value) && std::abs(value) < 1e15) {
      return std::optional<int64_t>(static_cast<int64_t>(value));
    }
  }
  return Error(StatusCode::kInvalidArgument, reason::kConfig, kRemedy,
               "a field of the model's config is not an integer: {}={}", name,
               node->dump(-1, ' ', true, nlohmann::json::error_handler_t::replace));
}

// What symbol definitions see: earlier symbols, the config, the tensor table.
class DefinitionScope : public Scope {
 public:
  DefinitionScope(const Symbols& symbols, const nlohmann::json& config, const TensorTable& table)
      : symbols_(symbols), config_(config), table_(table) {}

  Value Lookup(std::string_view name) const override {
    if (name.starts_with("config.")) return ConfigField(config_, name);
    WEIGHTD_ASSIGN_OR_RETURN(const int64_t value, symbols_.Get(name));
    return std::optional<int64_t>(value);
  }

  Value Size(std::string_view text, int dim) const override {
    WEIGHTD_ASSIGN_OR_RETURN(const NamePattern pattern, NamePattern::Parse(text));
    Captures captures;
    for (const TensorInfo& tensor : table_) {
      if (!pattern.Match(tensor.name, &captures)) continue;
      return std::optional<int64_t>(dim < tensor.shape.size() ? tensor.shape[dim] : 0);
    }
    return std::optional<int64_t>(0);
  }

 private:
  const Symbols& symbols_;
  const nlohmann::json& config_;
  const TensorTable& table_;
};

Status OnlyInSymbols(std::string_view what) {
  return Error(StatusCode::kInvalidArgument, reason::kRuleFile, "define a symbol with it",
               "only symbol lines may use {}", what);
}

}  // namespace

StatusOr<Symbols> Symbols::Evaluate(const RuleFile& file, std::string_view config_json,
                                    const TensorTable& table) {
  const nlohmann::json config =
      nlohmann::json::parse(config_json.begin(), config_json.end(), nullptr, false);
  if (!config.is_object()) {
    return Error(StatusCode::kInvalidArgument, reason::kConfig, kRemedy,
                 "the model's config is not a JSON object: {} bytes", config_json.size());
  }
  Symbols symbols;
  for (const SymbolDefinition& definition : file.symbols) {
    StatusOr<int64_t> value = definition.value.Evaluate(DefinitionScope(symbols, config, table));
    if (!value.ok()) {
      value = MakeError(value.status().code(),
                        fmt::format("symbol {} of {}:{}: {}", definition.name, file.origin,
                                    definition.line, Message(value.status())),
                        FieldsOf(value.status()));
    }
    symbols.values_.emplace_back(definition.name, std::move(value));
  }
  return symbols;
}

StatusOr<int64_t> Symbols::Get(std::string_view name) const {
  const auto found = std::find_if(values_.begin(), values_.end(),
                                  [name](const auto& entry) { return entry.first == name; });
  if (found != values_.end()) return found->second;
  return Error(StatusCode::kInvalidArgument, reason::kRuleFile, "define the symbol",
               "unknown symbol: {}", name);
}

void Symbols::Set(std::string_view name, int64_t value) {
  for (auto& [symbol, current] : values_) {
    if (symbol == name) current = value;
  }
}

Value RuleScope::Lookup(std::string_view name) const {
  if (name.starts_with('#')) {
    const int index = pattern_->IntegerIndex(name);
    return std::optional<int64_t>(captures_->integers[static_cast<size_t>(index)]);
  }
  if (name.starts_with("config.")) return OnlyInSymbols(name);
  WEIGHTD_ASSIGN_OR_RETURN(const int64_t value, symbols_.Get(name));
  return std::optional<int64_t>(value);
}

Value RuleScope::Size(std::string_view, int) const { return OnlyInSymbols("size()"); }

Value RankScope::Lookup(std::string_view name) const {
  if (name == "tp") return std::optional<int64_t>(coordinates_.tp_size);
  if (name == "ep") return std::optional<int64_t>(coordinates_.ep_size);
  if (name == "pp") return std::optional<int64_t>(coordinates_.pp_size);
  if (name.starts_with("config.")) return OnlyInSymbols(name);
  WEIGHTD_ASSIGN_OR_RETURN(const int64_t value, symbols_.Get(name));
  return std::optional<int64_t>(value);
}

Value RankScope::Size(std::string_view, int) const { return OnlyInSymbols("size()"); }

}  // namespace weightd
