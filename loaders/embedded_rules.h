// The rule files of this folder, as the build put them into the binary.
#pragma once

#include <span>
#include <string_view>

namespace weightd {

struct EmbeddedRules {
  std::string_view name;  ///< file stem
  std::string_view text;
};

/// All of them, ordered by name.
std::span<const EmbeddedRules> AllEmbeddedRules();

}  // namespace weightd
