// Named points at which a test can stop a process (test builds only, WEIGHTD_FAILPOINTS=ON).
#pragma once

#include <string_view>

namespace weightd {

/// In a test build, when the environment variable WEIGHTD_FAILPOINT_DIR is set and DIR/<name>.arm
/// exists: creates DIR/<name>.hit (content: pid) and waits until DIR/<name>.arm is removed or 60 s
/// have passed. Otherwise returns at once. Compiled to nothing where WEIGHTD_FAILPOINTS is not
/// defined.
#ifdef WEIGHTD_FAILPOINTS
void Failpoint(std::string_view name);
#else
inline void Failpoint(std::string_view) {}
#endif

}  // namespace weightd
