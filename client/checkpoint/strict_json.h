// JSON from a file that may lie.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "daemon/base/status.h"

namespace weightd {

/// Parses a whole document that must be an object: UTF-8, no key twice in one object, at most eight
/// levels deep. `what` names the text in errors ("header of a.safetensors").
/// \error INVALID_ARGUMENT CHECKPOINT naming `what`
StatusOr<nlohmann::json> ParseStrictJson(std::string_view text, std::string_view what);

}  // namespace weightd
