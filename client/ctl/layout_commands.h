// The commands of weightctl that need no daemon: golden cases and rule files.
#pragma once

#include <string>

#include "client/ctl/commands.h"

namespace weightd::ctl {

/// Prints the golden case of `file` with the parameters as weightd fills them. `loaders_dir` adds
/// rule files to the embedded ones; empty = none. The result is JSON in every format.
ExitCode RunPlanExport(const GlobalOptions& global, const std::string& file,
                       const std::string& loaders_dir);

/// Prints the model families that are known.
ExitCode RunLoaderList(const GlobalOptions& global, const std::string& loaders_dir);

/// Checks a rule file, or all of a directory; fails if one is malformed. With a trace file: fails
/// if the rules place an element elsewhere than tracing found.
ExitCode RunLoaderCheck(const GlobalOptions& global, const std::string& path,
                        const std::string& trace);

}  // namespace weightd::ctl
