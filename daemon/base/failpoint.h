// Named points at which a test can stop a process, or make it do the wrong thing (test builds only,
// WEIGHTD_FAILPOINTS=ON).
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

/// True in a test build if WEIGHTD_MUTATION, a comma-separated list, has `name`: the caller then
/// breaks its own result on purpose. tests/e2e/test_mutations.py shows that the suite notices each.
#ifdef WEIGHTD_FAILPOINTS
bool Mutated(std::string_view name);
#else
constexpr bool Mutated(std::string_view) { return false; }
#endif

}  // namespace weightd
