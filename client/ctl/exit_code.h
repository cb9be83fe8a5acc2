#pragma once

#include "daemon/base/status.h"

namespace weightd::ctl {

/// What weightctl exits with; documented in --help and client/README.md. Values never change.
enum class ExitCode : int {
  kOk = 0,
  kFailure = 1,
  kUsage = 2,
  kUnhealthy = 3,
  kUnreachable = 4,
  kTimeout = 124,
};

/// The exit code of a failed command. Errors that the daemon sent are failures; only this client
/// makes DAEMON_LOST (unreachable) and DEADLINE (no answer in time).
ExitCode ExitCodeOf(const Status& status);

/// The paragraph that --help ends with.
inline constexpr char kExitCodeHelp[] =
    "Exit codes: 0 ok, 1 failure, 2 usage, 3 unhealthy (health), 4 daemon unreachable,\n"
    "124 no answer within --timeout.";

}  // namespace weightd::ctl
