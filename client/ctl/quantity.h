// Numbers for people: bytes, rates and times with a unit and about three digits.
#pragma once

#include <cstdint>
#include <string>

namespace weightd::ctl {

/// "512 B", "1.50 GiB".
std::string HumanBytes(uint64_t bytes);
/// "3.10 GiB/s"; "-" for 0.
std::string HumanRate(double bytes_per_second);
/// "350 us", "12.3 ms", "1.25 s", "2m 05s", "3h 04m", "5d 06h".
std::string HumanTime(uint64_t microseconds);
/// "1,234,567".
std::string HumanCount(uint64_t count);

}  // namespace weightd::ctl
