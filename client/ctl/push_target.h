// Where a checkpoint goes: which model, as which version. Pure: answers of the daemon in, decision
// out.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "daemon/base/status.h"
#include "weightd/v1/admin.pb.h"

namespace weightd::ctl {

struct PushOptions {
  std::string directory;
  std::string model;       ///< empty: the only model there is
  uint64_t version = 0;    ///< 0: one above the highest that weightd knows
  bool take_over = false;  ///< fence a trainer that is registered
};

struct PushTarget {
  std::string model;
  uint64_t version = 0;
};

/// \error INVALID_ARGUMENT CONFIG if there are several models and none is named (a usage error)
/// \error NOT_FOUND NO_ENGINE if the model is unknown or has no engine
/// \error FAILED_PRECONDITION FENCED if a trainer is registered, since a push would fence it
/// \error FAILED_PRECONDITION CONFIG if an engine runs another architecture than config.json names
StatusOr<PushTarget> ChooseTarget(const v1::GetStatusResponse& status,
                                  const std::vector<std::string>& architectures,
                                  const PushOptions& options);

}  // namespace weightd::ctl
