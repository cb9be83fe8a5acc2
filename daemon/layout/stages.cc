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

Status CheckNumbers(std::span<const ParamInfo> params) {
  constexpr std::string_view kRemedy = "number the stages of a rank from 1 without gaps";
  std::vector<bool> seen(params.size() + 1);
  for (const ParamInfo& param : params) {
    if (param.stage > params.size()) return Refuse(param, kRemedy, "stages have a gap");
    seen[param.stage] = true;
  }
  for (const ParamInfo& param : params) {
    const bool after_gap = param.stage > 1 && !seen[param.stage - 1];
    if (after_gap) return Refuse(param, kRemedy, "stages have a gap");
  }
  return absl::OkStatus();
}

}  // namespace

uint32_t NumStages(std::span<const ParamInfo> params) {
  uint32_t stages = 0;
  for (const ParamInfo& param : params) stages = std::max(stages, param.stage);
  return stages;
}

uint64_t StagedBytes(std::span<const ParamInfo> params) {
  std::unordered_map<uint32_t, uint64_t> bytes;
  uint64_t largest = 0;
  for (const ParamInfo& param : params) {
    if (param.stage == 0 || !param.alias_of.empty()) continue;
    uint64_t& sum = bytes[param.stage];
    sum += static_cast<uint64_t>(NumElements(param.shape)) * SizeBytes(param.dtype);
    largest = std::max(largest, sum);
  }
  return largest;
}

Status CheckStages(std::span<const ParamInfo> params) {
  if (NumStages(params) == 0) return absl::OkStatus();
  WEIGHTD_RETURN_IF_ERROR(CheckNumbers(params));
  std::unordered_map<std::string_view, uint32_t> stage_of;
  for (const ParamInfo& param : params) stage_of.emplace(param.name, param.stage);
  for (const ParamInfo& param : params) {
    if (param.stage != 0 && param.kind != ParamKind::kDerived) {
      return Refuse(param, "give stages to derived parameters only",
                    "parameter that is not derived has a stage");
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
