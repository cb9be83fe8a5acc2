#include "daemon/layout/stages.h"

#include <algorithm>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace weightd {
namespace {

Status Refuse(const ParamInfo& param, std::string_view remedy, std::string_view what) {
  return WithTensor(Error(StatusCode::kInvalidArgument, reason::kConfig, remedy,
                          "{}: param={} stage={}", what, param.name, param.stage),
                    param.name);
}

/// Stages of one rank and parts of all its parameters, so that nobody's numbers fill memory.
constexpr uint32_t kMaxStages = 1u << 16;
constexpr uint64_t kMaxParts = 1u << 20;

/// Stages in which a parameter comes.
uint32_t NumParts(const ParamInfo& param) {
  if (param.stage_rows == 0 || param.shape.size() == 0 || !param.alias_of.empty()) return 1;
  const auto rows = static_cast<uint64_t>(param.shape[0]);
  const uint64_t parts = rows / param.stage_rows + (rows % param.stage_rows > 0 ? 1 : 0);
  return static_cast<uint32_t>(std::clamp<uint64_t>(parts, 1, kMaxStages + 1));
}

Status CheckNumbers(std::span<const ParamInfo> params) {
  constexpr std::string_view kRemedy = "number the stages of a rank from 1 without gaps";
  uint64_t most = 0;  // stages that there can be without a gap
  for (const ParamInfo& param : params) {
    most += NumParts(param);
    if (most > kMaxParts + params.size()) {
      return Refuse(param, "let parameters come in larger parts", "too many parts");
    }
  }
  most = std::min<uint64_t>(most, kMaxStages);
  std::vector<bool> seen(most + 1);
  for (const ParamInfo& param : params) {
    const uint64_t last = uint64_t{param.stage} + NumParts(param) - 1;
    if (last > most) return Refuse(param, kRemedy, "stages have a gap");
    std::fill(seen.begin() + param.stage, seen.begin() + static_cast<int64_t>(last) + 1, true);
  }
  for (const ParamInfo& param : params) {
    const bool after_gap = param.stage > 1 && !seen[param.stage - 1];
    if (after_gap) return Refuse(param, kRemedy, "stages have a gap");
  }
  return absl::OkStatus();
}

/// What of a write lands in rows [begin, end) of its parameter, in coordinates of that part.
/// \pre some of it does
Write CutRows(Write write, int64_t begin, int64_t end) {
  const int64_t first = std::max(begin, write.target.origin[0]);
  const int64_t rows = std::min(end, write.target.end(0)) - first;
  const int along = write.source_dim[0];
  if (!write.zero_fill && along >= 0) {
    write.source.origin[along] += first - write.target.origin[0];
    write.source.extent[along] = rows;
  }
  write.target.origin[0] = first - begin;
  write.target.extent[0] = rows;
  return write;
}

}  // namespace

uint32_t NumStages(std::span<const ParamInfo> params) {
  uint32_t stages = 0;
  for (const ParamInfo& param : params) {
    if (param.stage > 0) stages = std::max(stages, param.stage + NumParts(param) - 1);
  }
  return stages;
}

std::vector<ParamInfo> PartsOf(const ParamInfo& param) {
  const uint32_t num_parts = NumParts(param);
  std::vector<ParamInfo> parts(num_parts, param);
  for (uint32_t i = 0; i < num_parts; ++i) {
    parts[i].stage_rows = 0;
    if (num_parts == 1) break;
    const auto rows = static_cast<int64_t>(param.stage_rows);
    parts[i].stage += i;
    parts[i].shape[0] = std::min(rows, param.shape[0] - i * rows);
  }
  return parts;
}

RankLayout SplitStages(RankLayout layout) {
  const auto comes_in_parts = [](const ParamInfo& param) { return param.stage_rows > 0; };
  if (std::none_of(layout.params.begin(), layout.params.end(), comes_in_parts)) return layout;
  RankLayout split;
  split.coordinates = layout.coordinates;
  std::vector<uint32_t> first;  // of each parameter's parts
  for (const ParamInfo& param : layout.params) {
    first.push_back(static_cast<uint32_t>(split.params.size()));
    for (ParamInfo& part : PartsOf(param)) split.params.push_back(std::move(part));
  }
  for (const Write& write : layout.writes) {
    const ParamInfo& param = layout.params[write.param];
    if (NumParts(param) == 1) {
      split.writes.push_back(write);
      split.writes.back().param = first[write.param];
      continue;
    }
    const auto rows = static_cast<int64_t>(param.stage_rows);
    for (int64_t i = write.target.origin[0] / rows; i * rows < write.target.end(0); ++i) {
      split.writes.push_back(CutRows(write, i * rows, (i + 1) * rows));
      split.writes.back().param = first[write.param] + static_cast<uint32_t>(i);
    }
  }
  return split;
}

uint64_t StagedBytes(std::span<const ParamInfo> params) {
  std::unordered_map<uint32_t, uint64_t> bytes;
  uint64_t largest = 0;
  for (const ParamInfo& param : params) {
    if (param.stage == 0 || !param.alias_of.empty()) continue;
    for (const ParamInfo& part : PartsOf(param)) {
      uint64_t& sum = bytes[part.stage];
      sum += static_cast<uint64_t>(NumElements(part.shape)) * SizeBytes(part.dtype);
      largest = std::max(largest, sum);
    }
  }
  return largest;
}

Status CheckStages(std::span<const ParamInfo> params) {
  for (const ParamInfo& param : params) {
    if (param.pulled && (param.stage == 0 || param.kind == ParamKind::kOpaque)) {
      return Refuse(param,
                    "give a stage to every parameter that is pulled, and to none that is opaque",
                    "parameter cannot be pulled");
    }
    if (param.stage_rows != 0 && !param.pulled) {
      return Refuse(param, "let only pulled parameters come in parts",
                    "parameter that is not pulled comes in parts");
    }
  }
  if (NumStages(params) == 0) return absl::OkStatus();
  WEIGHTD_RETURN_IF_ERROR(CheckNumbers(params));
  std::unordered_map<std::string_view, uint32_t> stage_of;
  for (const ParamInfo& param : params) stage_of.emplace(param.name, param.stage);
  for (const ParamInfo& param : params) {
    if (param.stage != 0 && param.kind != ParamKind::kDerived && !param.pulled) {
      return Refuse(param, "give stages to derived and pulled parameters only",
                    "parameter that is neither derived nor pulled has a stage");
    }
    const auto shared = stage_of.find(param.alias_of);
    if (!param.alias_of.empty() && shared != stage_of.end() && shared->second != param.stage) {
      return Refuse(param, "give an alias the stage of the parameter that it shares memory with",
                    "alias of " + param.alias_of + " has another stage");
    }
  }
  return absl::OkStatus();
}

}  // namespace weightd
