#include <algorithm>
#include <cctype>
#include <numeric>
#include <unordered_set>

#include "daemon/layout/bound_loader.h"
#include "daemon/layout/name_distance.h"

namespace weightd {
namespace {

constexpr uint32_t kNone = ~uint32_t{0};

// Tensors that share a key share a BoundOp.
struct OpKey {
  uint32_t rule = 0;
  Shape shape;
  Captures captures;  // integers only if the rule's arguments read them
  bool operator==(const OpKey&) const = default;
};

struct OpKeyHash {
  size_t operator()(const OpKey& key) const {
    uint64_t hash = key.rule;
    const auto mix = [&hash](uint64_t value) {
      hash = (hash ^ value) * 0x9e3779b97f4a7c15ULL;
      hash ^= hash >> 29;
    };
    for (int64_t extent : key.shape) mix(static_cast<uint64_t>(extent));
    for (int64_t value : key.captures.integers) mix(static_cast<uint64_t>(value));
    for (int8_t value : key.captures.alternatives) mix(static_cast<uint64_t>(value));
    return hash;
  }
};

// A parameter while its place in layer order is not known yet.
struct Draft {
  std::string name;
  int phase = 0;
  int64_t layer = 0;
  uint32_t rule = 0;
  bool optional = false;
};

class Binder {
 public:
  Binder(std::shared_ptr<const RuleFile> file, const TensorTable& table) : table_(table) {
    rules_.file = std::move(file);
  }

  StatusOr<BoundRules> Run(std::string_view config_json, std::span<const ParamInfo> reported) {
    WEIGHTD_ASSIGN_OR_RETURN(rules_.symbols, Symbols::Evaluate(*rules_.file, config_json, table_));
    DecideTie(reported);
    WEIGHTD_RETURN_IF_ERROR(EvaluateConditions());
    WEIGHTD_RETURN_IF_ERROR(CheckNames());
    drafts_.reserve(table_.size());
    param_of_name_.reserve(table_.size());
    param_of_source_.reserve(table_.size());
    rules_.sources.reserve(table_.size());
    for (uint32_t tensor = 0; tensor < table_.size(); ++tensor) {
      const Status status = BindTensor(tensor);
      if (!status.ok()) return NameTensor(status, table_[tensor].name);
    }
    SortParams();
    WEIGHTD_RETURN_IF_ERROR(CheckSlots());
    return std::move(rules_);
  }

 private:
  const std::vector<Rule>& file_rules() const { return rules_.file->rules; }

  // A reported head that has its own storage is untied, whatever the config says, and the other way
  // round. A rank without one may be a pipeline stage: then the config decides.
  void DecideTie(std::span<const ParamInfo> reported) {
    if (rules_.file->head.empty()) return;
    for (const ParamInfo& param : reported) {
      if (param.name == rules_.file->head) {
        rules_.symbols.Set("tie", param.alias_of.empty() ? 0 : 1);
      }
    }
  }

  // Conditions that read no captures have one value for the whole model.
  Status EvaluateConditions() {
    for (const Rule& rule : file_rules()) {
      bool holds = true;
      if (rule.condition.has_value() && !rule.condition->reads_captures()) {
        StatusOr<int64_t> value =
            rule.condition->Evaluate(RuleScope(rules_.symbols, nullptr, nullptr));
        if (!value.ok()) return value.status();
        holds = *value != 0;
      }
      holds_.push_back(holds);
    }
    return absl::OkStatus();
  }

  Status CheckNames() {
    std::unordered_set<std::string_view> seen;
    seen.reserve(table_.size());
    rules_.names.reserve(table_.size());
    for (const TensorInfo& tensor : table_) {
      rules_.names.push_back(tensor.name);
      if (seen.insert(tensor.name).second) continue;
      return NameTensor(Error(StatusCode::kInvalidArgument, reason::kDuplicateTensor,
                              "register every tensor once", "the trainer registers a tensor twice"),
                        tensor.name);
    }
    return absl::OkStatus();
  }

  StatusOr<bool> Applies(uint32_t index, const Captures& captures) const {
    const Rule& rule = file_rules()[index];
    if (!rule.condition.has_value() || !rule.condition->reads_captures()) return holds_[index] != 0;
    WEIGHTD_ASSIGN_OR_RETURN(const int64_t value, rule.condition->Evaluate(RuleScope(
                                                      rules_.symbols, &rule.pattern, &captures)));
    return value != 0;
  }

  // The one rule that places a tensor; a rule that skips wins over the others.
  Status FindRule(const std::string& name, uint32_t* found, Captures* captures) const {
    uint32_t inactive = kNone;
    for (uint32_t i = 0; i < file_rules().size(); ++i) {
      const Rule& rule = file_rules()[i];
      if (*found != kNone && !rule.skips()) {
        if (file_rules()[*found].skips()) continue;
      }
      Captures candidate;
      if (!rule.pattern.Match(name, &candidate)) continue;
      WEIGHTD_ASSIGN_OR_RETURN(const bool applies, Applies(i, candidate));
      if (!applies) {
        // A wide pattern that skips nothing here says nothing about the name.
        if (!rule.pattern.has_star()) inactive = i;
        continue;
      }
      if (*found != kNone && !rule.skips() && !file_rules()[*found].skips()) {
        return Error(StatusCode::kInvalidArgument, reason::kAmbiguousRule,
                     "make the patterns or conditions of the two rules exclude each other",
                     "two rules place the same tensor: {}:{} and line {}", rules_.file->origin,
                     file_rules()[*found].line, rule.line);
      }
      *found = i;
      *captures = candidate;
    }
    return *found == kNone ? Unknown(name, inactive) : absl::OkStatus();
  }

  Status Unknown(const std::string& name, uint32_t inactive) const {
    constexpr char kRemedy[] =
        "map the name with name_map, leave the tensor out, or add a rule to the loader";
    if (inactive != kNone) {
      const Rule& rule = file_rules()[inactive];
      return Error(StatusCode::kInvalidArgument, reason::kUnknownTensor, kRemedy,
                   "no rule of loader {} places this tensor: {}:{} matches, but its condition "
                   "'{}' is false for this model's config",
                   rules_.file->name, rules_.file->origin, rule.line, rule.condition->text());
    }
    return Error(StatusCode::kInvalidArgument, reason::kUnknownTensor, kRemedy,
                 "no rule of loader {} ({}) knows this tensor; nearest known names: {}",
                 rules_.file->name, rules_.file->origin, fmt::join(KnownNames(name), ", "));
  }

  // Names that the rules would take, with the numbers of `name` in the places of captures.
  std::vector<std::string> KnownNames(const std::string& name) const {
    std::vector<int64_t> numbers;
    for (size_t i = 0; i < name.size(); ++i) {
      if (!std::isdigit(static_cast<unsigned char>(name[i]))) continue;
      if (i > 0 && name[i - 1] != '.') continue;
      numbers.push_back(std::atoi(name.c_str() + i));
    }
    std::vector<std::string> known;
    for (const Rule& rule : file_rules()) {
      if (rule.pattern.has_star()) continue;
      Captures captures;
      for (size_t i = 0; i < std::min<size_t>(numbers.size(), kMaxCaptures); ++i) {
        captures.integers[i] = numbers[i];
      }
      AddAlternatives(rule.pattern, 0, &captures, &known);
    }
    return NearestNames(name, known, 3);
  }

  static void AddAlternatives(const NamePattern& pattern, size_t group, Captures* captures,
                              std::vector<std::string>* known) {
    if (group == pattern.groups().size()) {
      pattern.AppendName(*captures, &known->emplace_back());
      return;
    }
    for (size_t choice = 0; choice < pattern.groups()[group].size(); ++choice) {
      captures->alternatives[group] = static_cast<int8_t>(choice);
      AddAlternatives(pattern, group + 1, captures, known);
    }
  }

  Status BindTensor(uint32_t tensor) {
    uint32_t index = kNone;
    Captures captures;
    WEIGHTD_RETURN_IF_ERROR(FindRule(table_[tensor].name, &index, &captures));
    const Rule& rule = file_rules()[index];
    if (rule.skips()) {
      rules_.skipped.push_back(tensor);
      return absl::OkStatus();
    }
    SourceBinding source{.tensor = tensor};
    WEIGHTD_ASSIGN_OR_RETURN(source.op, FindOp(index, captures, table_[tensor].shape));
    if (rule.ops.main.kind == OpKind::kMoe) {
      const int expert = rule.pattern.IntegerIndex(rule.ops.main.args[0].text());
      source.expert = captures.integers[static_cast<size_t>(expert)];
      const int64_t experts = rules_.ops[source.op].args[1];
      if (source.expert >= experts) {
        return Error(StatusCode::kInvalidArgument, reason::kUnknownTensor,
                     "give the config of the model that is trained",
                     "the config has fewer experts than the tensor's number: E={}, expert={}",
                     experts, source.expert);
      }
    }
    rules_.sources.push_back(source);
    param_of_source_.push_back(FindParam(index, captures));
    return absl::OkStatus();
  }

  StatusOr<uint32_t> FindOp(uint32_t index, const Captures& captures, const Shape& shape) {
    const Rule& rule = file_rules()[index];
    OpKey key{index, shape, captures};
    if (!rule.ops_read_captures) key.captures.integers = {};
    const auto found = ops_.find(key);
    if (found != ops_.end()) return found->second;
    WEIGHTD_ASSIGN_OR_RETURN(BoundOp op,
                             BindOp(rule.ops, rule.pattern, captures, shape,
                                    RuleScope(rules_.symbols, &rule.pattern, &captures)));
    const uint32_t position = static_cast<uint32_t>(rules_.ops.size());
    rules_.ops.push_back(std::move(op));
    ops_.emplace(key, position);
    return position;
  }

  uint32_t FindParam(uint32_t index, const Captures& captures) {
    const Rule& rule = file_rules()[index];
    scratch_.clear();
    rule.target.AppendName(captures, &scratch_);
    const auto [entry, added] =
        param_of_name_.try_emplace(scratch_, static_cast<uint32_t>(drafts_.size()));
    if (added) {
      const bool layered = !rule.pattern.integer_names().empty();
      drafts_.push_back(
          {scratch_, rule.phase, layered ? captures.integers[0] : 0, index, rule.optional});
    }
    return entry->second;
  }

  void SortParams() {
    std::vector<uint32_t> order(drafts_.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [this](uint32_t a, uint32_t b) {
      const Draft& x = drafts_[a];
      const Draft& y = drafts_[b];
      return std::tie(x.phase, x.layer, x.rule) < std::tie(y.phase, y.layer, y.rule);
    });
    std::vector<uint32_t> place(drafts_.size());
    for (uint32_t i = 0; i < order.size(); ++i) {
      place[order[i]] = i;
      Draft& draft = drafts_[order[i]];
      rules_.params.push_back({.name = std::move(draft.name), .optional = draft.optional});
    }
    for (const uint32_t param : param_of_source_) ++rules_.params[place[param]].count;
    uint32_t first = 0;
    for (LogicalParam& param : rules_.params) {
      param.first = first;
      first += param.count;
      param.count = 0;
    }
    std::vector<SourceBinding> sorted(rules_.sources.size());
    for (size_t i = 0; i < rules_.sources.size(); ++i) {
      LogicalParam& param = rules_.params[place[param_of_source_[i]]];
      sorted[param.first + param.count++] = rules_.sources[i];
    }
    rules_.sources = std::move(sorted);
  }

  // Two sources for one slot would overlap; distinct slots never do.
  Status CheckSlots() const {
    std::vector<SourceBinding> sorted;
    for (const LogicalParam& param : rules_.params) {
      if (param.count < 2) continue;
      const auto first = rules_.sources.begin() + param.first;
      sorted.assign(first, first + param.count);
      const auto key = [this](const SourceBinding& source) {
        return std::pair(source.expert, rules_.ops[source.op].slot_begin);
      };
      std::sort(sorted.begin(), sorted.end(),
                [&key](const auto& a, const auto& b) { return key(a) < key(b); });
      for (size_t i = 1; i < sorted.size(); ++i) {
        const SourceBinding& a = sorted[i - 1];
        const SourceBinding& b = sorted[i];
        const bool apart = a.expert == b.expert
                               ? rules_.ops[a.op].slot_end <= rules_.ops[b.op].slot_begin
                               : a.expert >= 0;
        if (apart) continue;
        return NameTensor(
            Error(StatusCode::kInvalidArgument, reason::kDuplicateTensor,
                  "register the weights under one set of names",
                  "two tensors fill the same part of engine parameter {}: the other is {}",
                  param.name, rules_.names[a.tensor]),
            rules_.names[b.tensor]);
      }
    }
    return absl::OkStatus();
  }

  const TensorTable& table_;
  BoundRules rules_;
  std::vector<char> holds_;
  std::unordered_map<OpKey, uint32_t, OpKeyHash> ops_;
  std::unordered_map<std::string, uint32_t> param_of_name_;
  std::vector<Draft> drafts_;
  std::vector<uint32_t> param_of_source_;
  std::string scratch_;
};

}  // namespace

StatusOr<BoundRules> BindRules(std::shared_ptr<const RuleFile> file, const TensorTable& table,
                               std::string_view config_json, std::span<const ParamInfo> reported) {
  return Binder(std::move(file), table).Run(config_json, reported);
}

Status NameTensor(const Status& status, std::string_view tensor) {
  if (status.ok()) return status;
  ErrorFields fields = FieldsOf(status);
  if (!fields.tensor.empty()) return status;
  fields.tensor = std::string(tensor);
  return MakeError(status.code(), fmt::format("{}: tensor={}", Message(status), tensor), fields);
}

}  // namespace weightd
