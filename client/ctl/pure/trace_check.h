// `weightctl loader check PATH --trace FILE`: what a rule file says about a model against what
// tracing the engine's own loader found, element by element.
#pragma once

#include <string>

#include "client/ctl/pure/loader_commands.h"
#include "daemon/base/status.h"

namespace weightd {

/// Version of the trace file that is read.
inline constexpr int kTraceFormat = 1;

/// Compares rule file `path`, or those of the directory `path` that describe the traced
/// architecture and profile, with the trace file `trace` (JSON, or gzip of it; the format is in
/// loaders/README.md). The text names the first differing element of each parameter, for at most
/// kMaxDifferences parameters; JSON is {"trace", "architecture", "engine_profile", "files":
/// [{"path", "ok", "ranks", "parameters", "elements", "differing_parameters", "differences":
/// [{"rank", "parameter", "element", "rules", "traced", "count"}], "error"?, "remedy"?}]}. \error
/// NOT_FOUND for a missing file, and if no rule file describes the traced model; INVALID_ARGUMENT
/// for a file that is no trace, or whose blocks do not cover the parameters
StatusOr<LoaderCheck> CheckTrace(const std::string& path, const std::string& trace, bool json);

inline constexpr size_t kMaxDifferences = 10;

}  // namespace weightd
