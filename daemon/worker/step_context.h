#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "daemon/worker/step_runner.h"

namespace weightd {

/// What one run of a step knows.
struct StepRunner::Context {
  const v1::RunStep& command;
  std::atomic<bool>* cancelled = nullptr;
  const LandedByTarget* landed = nullptr;  ///< what a verification follows; nullptr: all is there
  Clock::time_point deadline = Clock::time_point::max();
  std::shared_ptr<const LoadedPlan> plan;  ///< shared with the store, which may drop it meanwhile
  std::vector<uint64_t> members;           ///< all that the step uses
  PinnedMembers pinned;
  uint64_t bytes_total = 0;
  uint64_t bytes_before = 0;                ///< of the targets that are done
  uint64_t bytes_now = 0;                   ///< of all targets, as the last window left it
  std::map<uint32_t, uint64_t> bytes_told;  ///< by target: bytes_now at its last Landed
  Clock::time_point reported = Clock::now();
};

}  // namespace weightd
