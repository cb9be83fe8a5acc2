#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

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

/// Microseconds per phase, in the order in which the phases began.
using PhaseTimes = std::vector<std::pair<Phase, uint64_t>>;

/// A phase that comes once per round has one entry, with the time of all rounds.
inline void AddTime(PhaseTimes& times, Phase phase, uint64_t micros) {
  const auto known =
      std::find_if(times.begin(), times.end(), [phase](const auto& t) { return t.first == phase; });
  if (known == times.end()) {
    times.emplace_back(phase, micros);
  } else {
    known->second += micros;
  }
}

}  // namespace weightd
