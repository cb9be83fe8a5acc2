#include "client/ctl/pure/case_export.h"

#include <zlib.h>

#include <nlohmann/json.hpp>

#include "client/ctl/pure/layout_runs.h"

namespace weightd {
namespace {

// Keys keep their order: the output is compared with the input by eye.
using Json = nlohmann::ordered_json;

// Largest case file, unpacked.
constexpr size_t kMaxCaseBytes = size_t{1} << 30;
constexpr char kRemedy[] = "give a file in the format of the golden layouts";

template <typename... Args>
Status NotACase(const std::string& origin, fmt::format_string<Args...> format, Args&&... args) {
  return Error(StatusCode::kInvalidArgument, reason::kConfig, kRemedy, "{}: {}", origin,
               fmt::format(format, std::forward<Args>(args)...));
}

// Reads plain or gzip files alike.
StatusOr<std::string> ReadCase(const std::string& path) {
  const gzFile file = gzopen(path.c_str(), "rb");
  if (file == nullptr) {
    return Error(StatusCode::kNotFound, reason::kConfig, "check the path", "cannot open case: {}",
                 path);
  }
  std::string text;
  std::string chunk(1 << 20, '\0');
  int count = 0;
  while ((count = gzread(file, chunk.data(), static_cast<unsigned>(chunk.size()))) > 0) {
    text.append(chunk, 0, static_cast<size_t>(count));
    if (text.size() > kMaxCaseBytes) break;
  }
  const bool complete = count == 0 && gzclose_r(file) == Z_OK;
  if (complete) return text;
  if (count != 0) gzclose_r(file);
  return NotACase(path, "{}",
                  text.size() > kMaxCaseBytes
                      ? "case too large: more than 1 GiB unpacked"
                      : "the file ends early or its compression is damaged");
}

// A non-negative integer field, or `fallback` where it is absent.
StatusOr<int> Field(const Json& object, const char* key, int fallback, const std::string& origin) {
  const auto found = object.find(key);
  if (found == object.end()) return fallback;
  if (found->is_number_unsigned() && found->get<uint64_t>() < (1u << 30)) {
    return static_cast<int>(found->get<uint64_t>());
  }
  return NotACase(origin, "'{}' is not a small non-negative integer: {}", key, found->dump());
}

StatusOr<std::string> Text(const Json& object, const char* key, const char* fallback,
                           const std::string& origin) {
  const auto found = object.find(key);
  if (found == object.end() && fallback != nullptr) return std::string(fallback);
  if (found != object.end() && found->is_string()) return found->get<std::string>();
  return NotACase(origin, "'{}' is missing or not a string", key);
}

StatusOr<TensorTable> Sources(const Json& root, const std::string& origin) {
  const auto list = root.find("source");
  if (list == root.end() || !list->is_array()) {
    return NotACase(origin, "'source' is missing or not a list of [name, shape]");
  }
  TensorTable table;
  for (const Json& entry : *list) {
    const bool pair = entry.is_array() && entry.size() == 2 && entry[0].is_string() &&
                      entry[1].is_array() && entry[1].size() <= kMaxDims;
    if (!pair) return NotACase(origin, "source {} is not [name, shape]", table.size());
    TensorInfo tensor{.name = entry[0].get<std::string>(), .dtype = DType::kFloat32};
    for (const Json& extent : entry[1]) {
      tensor.shape.push_back(extent.is_number_integer() ? extent.get<int64_t>() : -1);
    }
    if (!ValidShape({tensor.shape.begin(), tensor.shape.end()})) {
      return NotACase(origin, "source {} has no valid shape: {}", tensor.name, entry[1].dump());
    }
    table.push_back(std::move(tensor));
  }
  return table;
}

StatusOr<EngineCoordinates> Coordinates(const Json& rank, const std::string& origin) {
  if (!rank.is_object()) return NotACase(origin, "a rank is not an object: {}", rank.dump());
  EngineCoordinates at;
  WEIGHTD_ASSIGN_OR_RETURN(at.tp_size, Field(rank, "tp_size", 1, origin));
  WEIGHTD_ASSIGN_OR_RETURN(at.tp_rank, Field(rank, "tp_rank", 0, origin));
  WEIGHTD_ASSIGN_OR_RETURN(at.ep_size, Field(rank, "ep_size", 1, origin));
  WEIGHTD_ASSIGN_OR_RETURN(at.ep_rank, Field(rank, "ep_rank", 0, origin));
  return at;
}

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
    WEIGHTD_ASSIGN_OR_RETURN(const EngineCoordinates at, Coordinates(rank, origin));
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
                           Text(root, "architecture", nullptr, origin));
  WEIGHTD_ASSIGN_OR_RETURN(const std::string profile,
                           Text(root, "engine_profile", kDefaultProfile, origin));
  const auto config = root.find("config");
  if (config == root.end() || !config->is_object()) {
    return NotACase(origin, "'config' is missing or not an object");
  }
  WEIGHTD_ASSIGN_OR_RETURN(const TensorTable table, Sources(root, origin));
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
