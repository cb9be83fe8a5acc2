#include "client/ctl/pure/trace_check.h"

#include <algorithm>
#include <optional>

#include "client/ctl/pure/case_json.h"
#include "client/ctl/pure/layout_runs.h"
#include "client/ctl/pure/trace_file.h"

namespace weightd {
namespace {

/// The first element of a parameter about which two layouts disagree.
struct Difference {
  std::string rank;
  std::string param;
  std::string element;
  std::string rules;
  std::string traced;
  int64_t count = 0;  ///< elements that differ
};

/// What one rule file makes of a trace.
struct Comparison {
  int64_t params = 0;
  int64_t elements = 0;
  size_t num_differing = 0;  ///< parameters
  std::vector<Difference> differences;
};

std::string RankText(const EngineCoordinates& at) {
  std::string text = fmt::format("tp {}/{}", at.tp_rank, at.tp_size);
  if (at.pp_size > 1) text += fmt::format(", pp {}/{}", at.pp_rank, at.pp_size);
  if (at.ep_size > 1) text += fmt::format(", ep {}/{}", at.ep_rank, at.ep_size);
  return text;
}

/// "[3, 0]": the place of element `index` of a row-major tensor.
std::string Place(int64_t index, const Shape& shape) {
  const Dims strides = RowMajorStrides(shape);
  Dims place = Dims::Filled(shape.size(), 0);
  for (int d = 0; d < shape.size(); ++d) {
    place[d] = index / strides[d];
    index %= strides[d];
  }
  return ToString(place);
}

/// What element `index` of a parameter is according to a run that covers it.
std::string Origin(const Run& run, int64_t index, const TensorTable& table) {
  if (run.source < 0) return "zero";
  const TensorInfo& tensor = table[static_cast<size_t>(run.source)];
  return tensor.name + Place(run.start + (index - run.offset) * run.stride, tensor.shape);
}

/// Of `length` elements from `begin` on, which both runs cover, those that differ.
struct Span {
  int64_t count = 0;
  int64_t first = 0;
};
Span Compare(const Run& a, const Run& b, int64_t begin, int64_t length) {
  if (a.source < 0 && b.source < 0) return {};
  if (a.source != b.source) return {length, begin};
  const int64_t gap =
      a.start + (begin - a.offset) * a.stride - b.start - (begin - b.offset) * b.stride;
  const int64_t step = a.stride - b.stride;
  if (gap == 0 && (step == 0 || length == 1)) return {};
  // The distance grows by `step` per element and is zero once at the most.
  const bool meets = step != 0 && -gap % step == 0 && -gap / step >= 0 && -gap / step < length;
  return {length - (meets ? 1 : 0), gap == 0 ? begin + 1 : begin};
}

/// \pre both lists cover the parameter exactly once
std::optional<Difference> CompareRuns(const std::vector<Run>& rules, const std::vector<Run>& traced,
                                      const ParamInfo& param, const TensorTable& table) {
  Difference found;
  size_t i = 0;
  size_t j = 0;
  for (int64_t at = 0; at < NumElements(param.shape);) {
    const int64_t end =
        std::min(rules[i].offset + rules[i].length, traced[j].offset + traced[j].length);
    const Span span = Compare(rules[i], traced[j], at, end - at);
    if (span.count > 0 && found.count == 0) {
      found.param = param.name;
      found.element = Place(span.first, param.shape);
      found.rules = Origin(rules[i], span.first, table);
      found.traced = Origin(traced[j], span.first, table);
    }
    found.count += span.count;
    at = end;
    if (rules[i].offset + rules[i].length == at) ++i;
    if (traced[j].offset + traced[j].length == at) ++j;
  }
  if (found.count == 0) return std::nullopt;
  return found;
}

StatusOr<Comparison> Compare(const Loader& loader, const TraceFile& trace) {
  Comparison result;
  WEIGHTD_ASSIGN_OR_RETURN(const auto bound,
                           loader.Bind(trace.table, trace.config_json, trace.architecture,
                                       trace.profile, trace.ranks.front().params));
  for (const RankLayout& rank : trace.ranks) {
    const std::string label = RankText(rank.coordinates);
    const StatusOr<RankLayout> layout = bound->Lower(rank.coordinates, rank.params);
    if (!layout.ok()) return WithRank(layout.status(), label);
    WEIGHTD_ASSIGN_OR_RETURN(const auto rules, RunsOf(*layout, trace.table));
    WEIGHTD_ASSIGN_OR_RETURN(const auto traced, RunsOf(rank, trace.table));
    for (size_t i = 0; i < rank.params.size(); ++i) {
      ++result.params;
      result.elements += NumElements(rank.params[i].shape);
      auto difference = CompareRuns(rules[i], traced[i], rank.params[i], trace.table);
      if (!difference.has_value()) continue;
      if (++result.num_differing > kMaxDifferences) continue;
      difference->rank = label;
      result.differences.push_back(*std::move(difference));
    }
  }
  return result;
}

std::string Text(const std::string& path, const TraceFile& trace, const Comparison& result) {
  if (result.differences.empty()) {
    return fmt::format(
        "ok     {}: tracing found the same: {} {}, {} ranks, {} parameters, {} elements\n", path,
        trace.architecture, trace.profile, trace.ranks.size(), result.params, result.elements);
  }
  std::string text = fmt::format("error  {}: tracing found other elements in {} of {} parameters\n",
                                 path, result.num_differing, result.params);
  for (const Difference& one : result.differences) {
    text += fmt::format("       {}: {}{}: rules={} traced={} ({} elements of it differ)\n",
                        one.rank, one.param, one.element, one.rules, one.traced, one.count);
  }
  return text;
}

Json ToJson(const Comparison& result, size_t num_ranks) {
  Json list = Json::array();
  for (const Difference& one : result.differences) {
    list.push_back({{"rank", one.rank},
                    {"parameter", one.param},
                    {"element", one.element},
                    {"rules", one.rules},
                    {"traced", one.traced},
                    {"count", one.count}});
  }
  return {{"ranks", num_ranks},
          {"parameters", result.params},
          {"elements", result.elements},
          {"differing_parameters", result.num_differing},
          {"differences", std::move(list)}};
}

bool Describes(const Loader& loader, const TraceFile& trace) {
  const std::vector<std::string>& names = loader.architectures();
  return std::find(names.begin(), names.end(), trace.architecture) != names.end() &&
         MatchProfile(trace.profile, loader.profiles());
}

/// The rule files at `path` that describe the traced model.
StatusOr<std::vector<std::shared_ptr<const Loader>>> Candidates(const std::string& path,
                                                                const TraceFile& trace) {
  WEIGHTD_ASSIGN_OR_RETURN(const std::vector<std::string> files, RuleFiles(path));
  std::vector<std::shared_ptr<const Loader>> found;
  for (const std::string& file : files) {
    WEIGHTD_ASSIGN_OR_RETURN(auto loader, ParseRuleFile(file));
    if (Describes(*loader, trace)) found.push_back(std::move(loader));
  }
  if (!found.empty()) return found;
  return Error(StatusCode::kNotFound, reason::kUnknownArchitecture,
               "name the rule file of the model that was traced",
               "no rule file at {} describes the traced model: {} {}", path, trace.architecture,
               trace.profile);
}

}  // namespace

StatusOr<LoaderCheck> CheckTrace(const std::string& path, const std::string& trace_path,
                                 bool json) {
  WEIGHTD_ASSIGN_OR_RETURN(const std::string text, ReadCase(trace_path));
  WEIGHTD_ASSIGN_OR_RETURN(const TraceFile trace, ParseTrace(text, trace_path));
  WEIGHTD_ASSIGN_OR_RETURN(const auto loaders, Candidates(path, trace));
  LoaderCheck check{.passed = true};
  Json list = Json::array();
  for (const auto& loader : loaders) {
    const StatusOr<Comparison> result = Compare(*loader, trace);
    const bool same = result.ok() && result->differences.empty();
    check.passed = check.passed && same;
    Json entry{{"path", loader->origin()}, {"ok", same}};
    if (result.ok()) {
      entry.update(ToJson(*result, trace.ranks.size()));
      check.output += Text(loader->origin(), trace, *result);
    } else {
      const ErrorFields fields = FieldsOf(result.status());
      entry["error"] = Message(result.status());
      entry["remedy"] = fields.remedy;
      check.output += fmt::format("error  {}: {}: {}\n       {}\n", loader->origin(), fields.rank,
                                  Message(result.status()), fields.remedy);
    }
    list.push_back(std::move(entry));
  }
  if (json) {
    check.output = Json{{"trace", trace_path},
                        {"architecture", trace.architecture},
                        {"engine_profile", trace.profile},
                        {"files", list}}
                       .dump(2) +
                   "\n";
  }
  return check;
}

}  // namespace weightd
