// `weightctl plan export --case FILE`: fills the parameters of a golden-layout case as weightd
// would, without a daemon.
#pragma once

#include <string>
#include <string_view>

#include "daemon/base/status.h"
#include "daemon/layout/loader.h"

namespace weightd {

/// Engine profile of a case that names none.
inline constexpr char kDefaultProfile[] = "vllm-0.32";

/// Reads `path` (JSON, or gzip of it) and returns it with `ranks[].params` replaced by what the
/// loaders make of `source`: [name, local shape, runs] per parameter, a run being [destination
/// offset, length, source index, source offset, source stride] in row-major elements, -1 as source
/// index for zero fill. Runs are in order, cover every element once and are as long as they can be,
/// taken greedily.
/// \error NOT_FOUND for an unreadable file; INVALID_ARGUMENT for one that is no case; else what the
/// loader says, naming the rank
StatusOr<std::string> ExportCase(const std::string& path, const LoaderRegistry& registry);

/// Same, from the text itself. `origin` names it in errors.
StatusOr<std::string> ExportCaseText(std::string_view text, const std::string& origin,
                                     const LoaderRegistry& registry);

}  // namespace weightd
