#pragma once

#include <array>
#include <string_view>

namespace weightd {

/// The steps of one sync, in order; values equal weightd.v1.Phase. The names appear in logs,
/// metrics and weightctl.
enum class Phase {
  kNone = 0,
  kAdmit = 1,
  kResolveLayouts = 2,
  kBuildPlan = 3,
  kPrepare = 4,
  kTransfer = 5,
  kVerify = 6,
  kCommit = 7,
  kReport = 8,
};
inline constexpr int kNumPhases = 9;

inline constexpr std::string_view Name(Phase phase) {
  constexpr std::array<std::string_view, kNumPhases> kNames = {
      "none",     "admit",  "resolve_layouts", "build_plan", "prepare",
      "transfer", "verify", "commit",          "report"};
  return kNames[static_cast<size_t>(phase)];
}

}  // namespace weightd
