#include "client/ctl/pure/case_export.h"

#include "client/ctl/pure/case_json.h"
#include "client/ctl/pure/layout_runs.h"

namespace weightd {
namespace {

StatusOr<Json> ParamsOf(const BoundLoader& bound, const EngineCoordinates& at,
                        const TensorTable& table) {
  WEIGHTD_ASSIGN_OR_RETURN(const RankLayout layout, bound.Lower(at, {}));
  WEIGHTD_ASSIGN_OR_RETURN(const auto runs, RunsOf(layout, table));
  Json params = Json::array();
  for (size_t i = 0; i < layout.params.size(); ++i) {
    Json list = Json::array();
    for (const Run& run : runs[i]) {
      list.push_back({run.offset, run.length, run.source, run.start, run.stride});
    }
    Json shape = Json::array();
    for (const int64_t extent : layout.params[i].shape) shape.push_back(extent);
    params.push_back({layout.params[i].name, std::move(shape), std::move(list)});
  }
  return params;
}

// Replaces the parameters of every rank of the case.
Status FillRanks(const BoundLoader& bound, const TensorTable& table, const std::string& origin,
                 Json* root) {
  const auto ranks = root->find("ranks");
  if (ranks == root->end() || !ranks->is_array()) {
    return NotACase(origin, "'ranks' is missing or not a list of {{tp_size, tp_rank}}");
  }
  for (Json& rank : *ranks) {
    WEIGHTD_ASSIGN_OR_RETURN(const EngineCoordinates at, CaseCoordinates(rank, origin));
    StatusOr<Json> params = ParamsOf(bound, at, table);
    if (!params.ok()) {
      return MakeError(params.status().code(),
                       fmt::format("{}: rank tp {}/{}, ep {}/{}: {}", origin, at.tp_rank,
                                   at.tp_size, at.ep_rank, at.ep_size, Message(params.status())),
                       FieldsOf(params.status()));
    }
    rank["params"] = *std::move(params);
  }
  return absl::OkStatus();
}

}  // namespace

StatusOr<std::string> ExportCaseText(std::string_view text, const std::string& origin,
                                     const LoaderRegistry& registry) {
  Json root = Json::parse(text.begin(), text.end(), nullptr, false);
  if (!root.is_object()) return NotACase(origin, "not a JSON object");
  WEIGHTD_ASSIGN_OR_RETURN(const std::string architecture,
                           CaseText(root, "architecture", nullptr, origin));
  WEIGHTD_ASSIGN_OR_RETURN(const std::string profile,
                           CaseText(root, "engine_profile", kDefaultProfile, origin));
  const auto config = root.find("config");
  if (config == root.end() || !config->is_object()) {
    return NotACase(origin, "'config' is missing or not an object");
  }
  WEIGHTD_ASSIGN_OR_RETURN(const TensorTable table, CaseSources(root, origin));
  WEIGHTD_ASSIGN_OR_RETURN(const auto loader, registry.Find(architecture, profile));
  WEIGHTD_ASSIGN_OR_RETURN(const auto bound,
                           loader->Bind(table, config->dump(), architecture, profile, {}));
  WEIGHTD_RETURN_IF_ERROR(FillRanks(*bound, table, origin, &root));
  if (root.contains("skipped_sources")) {
    Json skipped = Json::array();
    for (const uint32_t tensor : bound->skipped()) skipped.push_back(table[tensor].name);
    root["skipped_sources"] = std::move(skipped);
  }
  return root.dump() + "\n";
}

StatusOr<std::string> ExportCase(const std::string& path, const LoaderRegistry& registry) {
  WEIGHTD_ASSIGN_OR_RETURN(const std::string text, ReadCase(path));
  return ExportCaseText(text, path, registry);
}

}  // namespace weightd
