#pragma once

#include <fmt/format.h>

#include <compare>
#include <cstdint>
#include <string>

namespace weightd {

/// Identity of one attempt to bring one replica to one version; never reused, also not after a
/// restart of the daemon.
struct AttemptId {
  uint64_t epoch = 0;
  uint64_t counter = 0;
  auto operator<=>(const AttemptId&) const = default;
};

inline std::string ToString(const AttemptId& id) {
  return fmt::format("{}.{}", id.epoch, id.counter);
}

/// A client process as workers know it: one actor rank or one engine rank that lends memory. Drawn
/// by the daemon.
enum class MemberId : uint64_t { kNone = 0 };

inline uint64_t Value(MemberId id) { return static_cast<uint64_t>(id); }

}  // namespace weightd
