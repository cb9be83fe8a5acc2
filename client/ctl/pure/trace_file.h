// A trace file: what ranks of an engine saw their own loader do.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/layout/tensor_layout.h"

namespace weightd {

struct TraceFile {
  std::string architecture;
  std::string profile;
  std::string config_json;
  TensorTable table;
  std::vector<RankLayout> ranks;  ///< each covers its parameters exactly once
};

/// Reads a trace; `origin` names it in errors.
/// \error INVALID_ARGUMENT CONFIG for text that is no trace; what the coverage proof refuses
StatusOr<TraceFile> ParseTrace(std::string_view text, const std::string& origin);

}  // namespace weightd
