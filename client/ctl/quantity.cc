#include "client/ctl/quantity.h"

#include <fmt/format.h>

#include <array>

namespace weightd::ctl {
namespace {

constexpr std::array kUnits = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};

// A value below 1024 of the largest unit that leaves it at least 1.
std::string Scaled(double value) {
  size_t unit = 0;
  // 1023.995 would print as "1024.00".
  while (value >= 1023.995 && unit + 1 < kUnits.size()) {
    value /= 1024;
    ++unit;
  }
  return unit == 0 ? fmt::format("{:.0f} B", value) : fmt::format("{:.2f} {}", value, kUnits[unit]);
}

}  // namespace

std::string HumanBytes(uint64_t bytes) { return Scaled(static_cast<double>(bytes)); }

std::string HumanRate(double bytes_per_second) {
  return bytes_per_second > 0 ? Scaled(bytes_per_second) + "/s" : "-";
}

std::string HumanTime(uint64_t microseconds) {
  if (microseconds < 1000) return fmt::format("{} us", microseconds);
  const double seconds = static_cast<double>(microseconds) / 1e6;
  if (microseconds < 999'950) return fmt::format("{:.1f} ms", seconds * 1e3);
  if (microseconds < 59'995'000) return fmt::format("{:.2f} s", seconds);
  const uint64_t whole = (microseconds + 500'000) / 1'000'000;
  const uint64_t minutes = whole / 60;
  const uint64_t hours = minutes / 60;
  if (hours == 0) return fmt::format("{}m {:02}s", minutes, whole % 60);
  if (hours < 24) return fmt::format("{}h {:02}m", hours, minutes % 60);
  return fmt::format("{}d {:02}h", hours / 24, hours % 24);
}

std::string HumanCount(uint64_t count) {
  std::string digits = std::to_string(count);
  for (size_t end = digits.size(); end > 3; end -= 3) digits.insert(end - 3, ",");
  return digits;
}

}  // namespace weightd::ctl
