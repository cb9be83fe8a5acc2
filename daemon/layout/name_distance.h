// Near misses: which known name a user may have meant.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace weightd {

/// At most `count` of `known`, the nearest to `name` by edit distance first.
std::vector<std::string> NearestNames(std::string_view name, const std::vector<std::string>& known,
                                      size_t count);

}  // namespace weightd
