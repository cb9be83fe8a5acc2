#include "client/ctl/pure/trace_file.h"

#include <algorithm>

#include "client/ctl/pure/case_export.h"
#include "client/ctl/pure/case_json.h"
#include "client/ctl/pure/trace_check.h"
#include "daemon/plan/transfer_plan.h"

namespace weightd {
namespace {

/// Fields of one write, in their order.
enum WriteField : size_t { kParam, kSource, kTargetOrigin, kExtent, kSourceOrigin, kSourceDim };
constexpr size_t kWriteFields = 6;

bool IsList(const Json& value, size_t count) {
  if (!value.is_array() || value.size() != count) return false;
  return std::all_of(value.begin(), value.end(),
                     [](const Json& item) { return item.is_number_integer(); });
}

Dims List(const Json& value) {
  Dims dims;
  for (const Json& item : value) dims.push_back(item.get<int64_t>());
  return dims;
}

Status ReadParams(const Json& rank, const std::string& origin, RankLayout* layout) {
  const auto params = rank.find("params");
  if (params == rank.end() || !params->is_array()) {
    return NotACase(origin, "'params' of a rank is missing or not a list of [name, shape]");
  }
  for (const Json& entry : *params) {
    const bool pair = entry.is_array() && entry.size() == 2 && entry[0].is_string() &&
                      entry[1].is_array() && entry[1].size() <= kMaxDims &&
                      IsList(entry[1], entry[1].size());
    if (!pair) return NotACase(origin, "a parameter is not [name, shape]: {}", entry.dump());
    const Dims shape = List(entry[1]);
    if (!ValidShape({shape.begin(), shape.end()})) {
      return NotACase(origin, "parameter has no valid shape: {}", entry.dump());
    }
    layout->params.push_back(
        {.name = entry[0].get<std::string>(), .shape = shape, .dtype = DType::kFloat32});
  }
  return absl::OkStatus();
}

StatusOr<Write> ReadWrite(const Json& entry, const TensorTable& table, const RankLayout& layout,
                          const std::string& origin) {
  const auto broken = [&] {
    return NotACase(origin,
                    "a write is not [param, source, target origin, extent, source origin, source "
                    "dim] of existing tensors: {}",
                    entry.dump());
  };
  const bool formed = entry.is_array() && entry.size() == kWriteFields &&
                      entry[kParam].is_number_unsigned() && entry[kSource].is_number_integer();
  if (!formed || entry[kParam].get<uint64_t>() >= layout.params.size()) return broken();
  const auto source = entry[kSource].get<int64_t>();
  if (source >= static_cast<int64_t>(table.size())) return broken();
  Write write;
  write.param = entry[kParam].get<uint32_t>();
  const auto dims = static_cast<size_t>(layout.params[write.param].shape.size());
  if (!IsList(entry[kTargetOrigin], dims) || !IsList(entry[kExtent], dims)) return broken();
  write.target = {List(entry[kTargetOrigin]), List(entry[kExtent])};
  write.zero_fill = source < 0;
  if (write.zero_fill) return write;
  write.tensor = static_cast<uint32_t>(source);
  const int rank = table[write.tensor].shape.size();
  const Json& follows = entry[kSourceDim];
  if (!IsList(entry[kSourceOrigin], static_cast<size_t>(rank)) || !IsList(follows, dims)) {
    return broken();
  }
  write.source = {List(entry[kSourceOrigin]), Dims::Filled(rank, 1)};
  for (size_t j = 0; j < dims; ++j) {
    const auto dim = follows[j].get<int64_t>();
    if (dim < -1 || dim >= rank) return broken();
    write.source_dim[j] = static_cast<int8_t>(dim);
    if (dim >= 0)
      write.source.extent[static_cast<int>(dim)] = write.target.extent[static_cast<int>(j)];
  }
  return write;
}

StatusOr<RankLayout> ReadRank(const Json& rank, const TensorTable& table,
                              const std::string& origin) {
  RankLayout layout;
  WEIGHTD_ASSIGN_OR_RETURN(layout.coordinates, CaseCoordinates(rank, origin));
  WEIGHTD_RETURN_IF_ERROR(ReadParams(rank, origin, &layout));
  const auto writes = rank.find("writes");
  if (writes == rank.end() || !writes->is_array()) {
    return NotACase(origin, "'writes' of a rank is missing or not a list");
  }
  for (const Json& entry : *writes) {
    WEIGHTD_ASSIGN_OR_RETURN(layout.writes.emplace_back(), ReadWrite(entry, table, layout, origin));
  }
  WEIGHTD_RETURN_IF_ERROR(CheckCoverage(table, layout));
  return layout;
}

}  // namespace

StatusOr<TraceFile> ParseTrace(std::string_view text, const std::string& origin) {
  const Json root = Json::parse(text.begin(), text.end(), nullptr, false);
  if (!root.is_object()) return NotACase(origin, "not a JSON object");
  WEIGHTD_ASSIGN_OR_RETURN(const int format, CaseNumber(root, "weightd_trace", 0, origin));
  if (format != kTraceFormat) {
    return NotACase(origin, "not a trace of format {}: 'weightd_trace' is {}", kTraceFormat,
                    format);
  }
  TraceFile trace;
  WEIGHTD_ASSIGN_OR_RETURN(trace.architecture, CaseText(root, "architecture", nullptr, origin));
  WEIGHTD_ASSIGN_OR_RETURN(trace.profile,
                           CaseText(root, "engine_profile", kDefaultProfile, origin));
  const auto config = root.find("config");
  if (config == root.end() || !config->is_object()) {
    return NotACase(origin, "'config' is missing or not an object");
  }
  trace.config_json = config->dump();
  WEIGHTD_ASSIGN_OR_RETURN(trace.table, CaseSources(root, origin));
  const auto ranks = root.find("ranks");
  if (ranks == root.end() || !ranks->is_array() || ranks->empty()) {
    return NotACase(origin, "'ranks' is missing or not a list of ranks");
  }
  for (const Json& rank : *ranks) {
    WEIGHTD_ASSIGN_OR_RETURN(trace.ranks.emplace_back(), ReadRank(rank, trace.table, origin));
  }
  return trace;
}

}  // namespace weightd
