#pragma once

#include <chrono>
#include <cstdint>

namespace weightd {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

/// Microseconds since `start`, on the steady clock.
inline uint64_t MicrosSince(Clock::time_point start) {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<microseconds>(Clock::now() - start).count());
}

}  // namespace weightd
