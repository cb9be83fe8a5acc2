// Whether a probe is to pass: judged from one status answer.
#pragma once

#include <string>
#include <vector>

#include "weightd/v1/admin.pb.h"

namespace weightd::ctl {

struct Health {
  bool healthy = false;
  std::string detail;  ///< one sentence: why, or what was found
};

/// The daemon: it does not drain and every worker is attached.
Health JudgeDaemon(const v1::GetStatusResponse& status);

/// Every replica of the engine called `engine` is ready, in whatever models it has. Unhealthy, with
/// the known names, if no engine is called so.
Health JudgeEngine(const v1::GetStatusResponse& status, const std::string& engine);

}  // namespace weightd::ctl
