// Which GPUs this machine has, found out by a short-lived process: the daemon itself never touches
// the CUDA driver.
#pragma once

#include <string>
#include <vector>

#include "daemon/base/status.h"

namespace weightd {

/// Prints the UUID of every GPU that this process sees, one a line. Returns the exit code; the
/// reason for a failure goes to standard error.
int PrintGpus();

/// Runs this binary with --list-gpus and returns what PrintGpus prints. Blocks for about a second.
/// \error FAILED_PRECONDITION DEVICE if there is no GPU or no driver
StatusOr<std::vector<std::string>> AskForGpus();

}  // namespace weightd
