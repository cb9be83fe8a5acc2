#include "daemon/layout/bound_loader.h"

#include <algorithm>
#include <unordered_set>

#include "daemon/base/failpoint.h"
#include "daemon/layout/name_distance.h"

namespace weightd {
namespace {

constexpr int32_t kUnreported = -1;
// Candidates listed for a parameter that misses sources.
constexpr size_t kMaxCandidates = 4096;

std::string RankText(const EngineCoordinates& at) {
  std::string text = fmt::format("tp {}/{}", at.tp_rank, at.tp_size);
  if (at.pp_size > 1) text += fmt::format(", pp {}/{}", at.pp_rank, at.pp_size);
  if (at.ep_size > 1) text += fmt::format(", ep {}/{}", at.ep_rank, at.ep_size);
  return text;
}

Status CheckCoordinates(const EngineCoordinates& at) {
  const auto bad = [](int rank, int size) { return size < 1 || rank < 0 || rank >= size; };
  if (!bad(at.tp_rank, at.tp_size) && !bad(at.pp_rank, at.pp_size) &&
      !bad(at.ep_rank, at.ep_size)) {
    return absl::OkStatus();
  }
  return Error(StatusCode::kInvalidArgument, reason::kWorldSize,
               "register the engine rank with 0 <= rank < size",
               "the engine rank's coordinates make no sense: {}, pp {}/{}, ep {}/{}", RankText(at),
               at.pp_rank, at.pp_size, at.ep_rank, at.ep_size);
}

class BoundLoaderImpl final : public BoundLoader {
 public:
  BoundLoaderImpl(BoundRules rules, std::span<const ParamInfo> reported)
      : rules_(std::move(rules)) {
    index_.reserve(rules_.params.size());
    for (uint32_t i = 0; i < rules_.params.size(); ++i) index_.emplace(rules_.params[i].name, i);
    for (const ParamInfo& param : reported) usual_.push_back(Find(param.name));
  }

  StatusOr<RankLayout> Lower(const EngineCoordinates& coordinates,
                             std::span<const ParamInfo> reported) const override;

  const std::vector<uint32_t>& skipped() const override { return rules_.skipped; }

 private:
  class Rank;

  // Position of a parameter among those the rules make; kUnreported if there is none.
  int32_t Find(std::string_view name) const {
    const auto found = index_.find(name);
    return found == index_.end() ? kUnreported : static_cast<int32_t>(found->second);
  }

  BoundRules rules_;
  std::unordered_map<std::string_view, uint32_t> index_;
  std::vector<int32_t> usual_;  // Find() of the names reported at Bind
};

// One call of Lower.
class BoundLoaderImpl::Rank {
 public:
  Rank(const BoundLoaderImpl& loader, const EngineCoordinates& at,
       std::span<const ParamInfo> reported)
      : loader_(loader), rules_(loader.rules_), reported_(reported) {
    layout_.coordinates = at;
  }

  StatusOr<RankLayout> Run() {
    const Status status = Lower();
    if (!status.ok()) return WithRank(status, RankText(layout_.coordinates));
    return std::move(layout_);
  }

 private:
  Status Lower() {
    WEIGHTD_RETURN_IF_ERROR(CheckCoordinates(layout_.coordinates));
    WEIGHTD_RETURN_IF_ERROR(CheckRequirements());
    WEIGHTD_RETURN_IF_ERROR(LowerOps());
    if (reported_.empty()) {
      DeriveParams();
    } else {
      WEIGHTD_RETURN_IF_ERROR(MapReported());
    }
    size_t count = 0;
    for (const SourceBinding& source : rules_.sources) count += plans_[source.op].writes.size();
    layout_.writes.reserve(count);
    for (uint32_t i = 0; i < rules_.params.size(); ++i) {
      WEIGHTD_RETURN_IF_ERROR(LowerParam(rules_.params[i], target_[i]));
    }
    if (Mutated("swap_tensors")) SwapTensors();
    return absl::OkStatus();
  }

  /// Exchanges what two neighbouring writes of equal shape read, such as those of k and v.
  void SwapTensors() {
    for (size_t i = 1; i < layout_.writes.size(); ++i) {
      Write& a = layout_.writes[i - 1];
      Write& b = layout_.writes[i];
      if (a.zero_fill || b.zero_fill || a.tensor == b.tensor || a.source.extent != b.source.extent)
        continue;
      std::swap(a.tensor, b.tensor);
      std::swap(a.source, b.source);
      return;
    }
  }

  Status CheckRequirements() const {
    for (const Requirement& requirement : rules_.file->requirements) {
      const RankScope scope(rules_.symbols, layout_.coordinates);
      WEIGHTD_ASSIGN_OR_RETURN(const int64_t holds, requirement.condition.Evaluate(scope));
      if (holds != 0) continue;
      std::string values;
      for (const std::string& name : requirement.condition.names()) {
        const auto value = scope.Lookup(name);
        if (!value.ok() || !value->has_value()) continue;
        values += fmt::format("{}{}={}", values.empty() ? "" : ", ", name, **value);
      }
      return Error(StatusCode::kInvalidArgument, reason::kDivisibility,
                   "run the engine with parallel sizes that the model supports",
                   "the engine cannot run this model at this size ({}:{}: require {}): {}",
                   rules_.file->origin, requirement.line, requirement.condition.text(), values);
    }
    return absl::OkStatus();
  }

  Status LowerOps() {
    plans_.reserve(rules_.ops.size());
    for (size_t i = 0; i < rules_.ops.size(); ++i) {
      StatusOr<OpPlan> plan = LowerOp(rules_.ops[i], layout_.coordinates);
      if (!plan.ok()) {
        const auto source = std::find_if(rules_.sources.begin(), rules_.sources.end(),
                                         [i](const SourceBinding& one) { return one.op == i; });
        return NameTensor(plan.status(), rules_.names[source->tensor]);
      }
      plans_.push_back(*std::move(plan));
    }
    return absl::OkStatus();
  }

  void DeriveParams() {
    target_.resize(rules_.params.size());
    layout_.params.reserve(rules_.params.size());
    for (size_t i = 0; i < rules_.params.size(); ++i) {
      const LogicalParam& param = rules_.params[i];
      target_[i] = static_cast<int32_t>(i);
      layout_.params.push_back({.name = param.name,
                                .shape = plans_[rules_.sources[param.first].op].param,
                                .dtype = DType::kFloat32,
                                .kind = ParamKind::kRaw});
    }
  }

  Status MapReported() {
    target_.assign(rules_.params.size(), kUnreported);
    layout_.params.assign(reported_.begin(), reported_.end());
    const std::vector<int32_t>& usual = loader_.usual_;
    std::unordered_set<std::string_view> unknown;
    for (size_t i = 0; i < reported_.size(); ++i) {
      const ParamInfo& param = reported_[i];
      int32_t logical = i < usual.size() ? usual[i] : kUnreported;
      if (logical < 0 || rules_.params[static_cast<size_t>(logical)].name != param.name) {
        logical = loader_.Find(param.name);
      }
      const bool repeated = logical < 0 ? !unknown.insert(param.name).second
                                        : target_[static_cast<size_t>(logical)] != kUnreported;
      if (repeated) {
        return NameTensor(Error(StatusCode::kInvalidArgument, reason::kDuplicateTensor,
                                "register every parameter of the engine rank once",
                                "the engine reports a parameter twice"),
                          param.name);
      }
      if (logical >= 0) {
        target_[static_cast<size_t>(logical)] = static_cast<int32_t>(i);
      } else if (Written(param)) {
        return Uncovered(param.name);
      }
    }
    return absl::OkStatus();
  }

  Status LowerParam(const LogicalParam& logical, int32_t index) {
    if (index == kUnreported) {
      const bool elsewhere = layout_.coordinates.pp_size > 1 || logical.optional;
      return elsewhere ? absl::OkStatus() : Unreported(logical);
    }
    const ParamInfo& param = layout_.params[static_cast<size_t>(index)];
    if (!Written(param)) return absl::OkStatus();
    const Shape& implied = plans_[rules_.sources[logical.first].op].param;
    if (!reported_.empty() && implied != param.shape) return WrongShape(logical, param.shape);
    int64_t covered = 0;
    for (uint32_t i = logical.first; i < logical.first + logical.count; ++i) {
      const SourceBinding& source = rules_.sources[i];
      const OpPlan& plan = plans_[source.op];
      if (plan.param != implied) return Disagreement(logical, source);
      const int64_t slot = source.expert - plan.first_expert;
      if (plan.per_expert && (slot < 0 || slot >= plan.num_experts)) continue;
      covered += plan.num_elements;
      for (const Write& write : plan.writes) {
        Write& added = layout_.writes.emplace_back(write);
        added.tensor = write.zero_fill ? 0 : source.tensor;
        added.param = static_cast<uint32_t>(index);
        if (plan.per_expert) added.target.origin[0] = slot;
      }
    }
    return covered == NumElements(implied) ? absl::OkStatus() : Uncovered(logical.name);
  }

  Status WrongShape(const LogicalParam& logical, const Shape& reported) const {
    const SourceBinding& source = rules_.sources[logical.first];
    return NameTensor(
        Error(StatusCode::kInvalidArgument, reason::kShape,
              "run trainer and engine with the same model config and check the engine's parallel "
              "sizes",
              "engine parameter {} has another shape than its sources imply on {}: reported={}, "
              "implied={} by {} {} ({})",
              logical.name, RankText(layout_.coordinates), ToString(reported),
              ToString(plans_[source.op].param), rules_.names[source.tensor],
              ToString(rules_.ops[source.op].source), rules_.ops[source.op].spec->main.text),
        logical.name);
  }

  Status Disagreement(const LogicalParam& logical, const SourceBinding& source) const {
    const SourceBinding& first = rules_.sources[logical.first];
    return NameTensor(
        Error(StatusCode::kInvalidArgument, reason::kShape, "register tensors of one model",
              "two sources imply different shapes of engine parameter {}: {} {} implies {}, {} {} "
              "implies {}",
              logical.name, rules_.names[first.tensor], ToString(rules_.ops[first.op].source),
              ToString(plans_[first.op].param), rules_.names[source.tensor],
              ToString(rules_.ops[source.op].source), ToString(plans_[source.op].param)),
        rules_.names[source.tensor]);
  }

  Status Unreported(const LogicalParam& logical) const {
    std::vector<std::string> reported;
    for (const ParamInfo& param : reported_) reported.push_back(param.name);
    // The distance is quadratic in the names' length: near names are near in the list, too.
    if (reported.size() > kMaxCandidates) reported.resize(kMaxCandidates);
    return NameTensor(
        Error(StatusCode::kInvalidArgument, reason::kUnknownTensor,
              "run trainer and engine with the same model config, or leave the tensor out",
              "the engine has no parameter for this tensor: wanted={}, nearest reported={}",
              logical.name, fmt::join(NearestNames(logical.name, reported, 3), ", ")),
        rules_.names[rules_.sources[logical.first].tensor]);
  }

  // Why `param` is not covered: which sources the rules would take for it, or that no rule does.
  Status Uncovered(const std::string& param) const {
    const std::unordered_set<std::string_view> present(rules_.names.begin(), rules_.names.end());
    const StatusOr<int64_t> experts = rules_.symbols.Get("E");
    std::vector<std::string> missing;
    bool known = false;
    for (const Rule& rule : rules_.file->rules) {
      if (rule.skips()) continue;
      for (std::string& source : rule.target.SourcesOf(
               param, rule.pattern, experts.ok() ? *experts : 1, kMaxCandidates)) {
        if (!Holds(rule, source)) continue;
        known = true;
        if (!present.contains(source)) missing.push_back(std::move(source));
      }
    }
    if (!known) {
      return NameTensor(
          Error(StatusCode::kInvalidArgument, reason::kUncoveredParameter,
                "add a rule to the loader, or report the parameter as opaque if it is not a weight "
                "of the trainer",
                "no rule of loader {} ({}) writes this parameter of the engine", rules_.file->name,
                rules_.file->origin),
          param);
    }
    if (missing.empty()) return Skipped(param);
    const size_t more = missing.size() > 3 ? missing.size() - 3 : 0;
    if (more > 0) missing.resize(3);
    return NameTensor(
        Error(StatusCode::kInvalidArgument, reason::kMissingTensor,
              "register these tensors with the trainer",
              "the trainer lacks tensors that engine parameter {} is made of: {}{}", param,
              fmt::join(missing, ", "), more > 0 ? fmt::format(" and {} more", more) : ""),
        missing.front());
  }

  // The trainer has all sources of `param`, but rules that skip took them.
  Status Skipped(const std::string& param) const {
    return NameTensor(
        Error(StatusCode::kInvalidArgument, reason::kUncoveredParameter,
              "give the config with which the engine made the parameter (bias, tied head), or "
              "correct the rules that skip",
              "rules of loader {} ({}) skip every tensor that this parameter is made of",
              rules_.file->name, rules_.file->origin),
        param);
  }

  bool Holds(const Rule& rule, const std::string& source) const {
    if (!rule.condition.has_value()) return true;
    Captures captures;
    if (!rule.pattern.Match(source, &captures)) return false;
    const StatusOr<int64_t> value =
        rule.condition->Evaluate(RuleScope(rules_.symbols, &rule.pattern, &captures));
    return value.ok() && *value != 0;
  }

  const BoundLoaderImpl& loader_;
  const BoundRules& rules_;
  std::span<const ParamInfo> reported_;
  std::vector<OpPlan> plans_;    // per BoundRules::ops
  std::vector<int32_t> target_;  // per logical parameter: its position in layout_.params
  RankLayout layout_;
};

StatusOr<RankLayout> BoundLoaderImpl::Lower(const EngineCoordinates& coordinates,
                                            std::span<const ParamInfo> reported) const {
  return Rank(*this, coordinates, reported).Run();
}

}  // namespace

std::shared_ptr<const BoundLoader> MakeBoundLoader(BoundRules rules,
                                                   std::span<const ParamInfo> reported) {
  return std::make_shared<const BoundLoaderImpl>(std::move(rules), reported);
}

}  // namespace weightd
