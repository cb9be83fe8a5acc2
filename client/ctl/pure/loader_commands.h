// `weightctl loader list` and `weightctl loader check PATH`, without a daemon.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/layout/loader.h"

namespace weightd {

/// The loaders of a registry: name, origin, profiles, architectures. Text is a table, JSON
/// {"loaders": [{"name", "source", "origin", "profiles", "architectures"}]}, where source is
/// "embedded" or "directory" and origin the embedded name or the file's path.
std::string ListLoaders(const LoaderRegistry& registry, bool json);

/// The rule file `path`, or every *.rules file of the directory `path`, sorted.
/// \error NOT_FOUND if there is none
StatusOr<std::vector<std::string>> RuleFiles(const std::string& path);

/// \error NOT_FOUND for an unreadable file, INVALID_ARGUMENT RULE_FILE for a malformed one
StatusOr<std::shared_ptr<const Loader>> ParseRuleFile(const std::string& path);

/// What `loader check` found.
struct LoaderCheck {
  std::string output;   ///< for stdout, ends with a newline
  bool passed = false;  ///< the exit code is 0 if so, 1 otherwise
};

/// Parses the rule file `path`, or every *.rules file of the directory `path`, and reports each as
/// sound or with its first error (file:line and the remedy). JSON is {"files": [{"path", "ok",
/// "error"?, "remedy"?, "architectures"?, "profiles"?}]}.
/// \error NOT_FOUND if there is no such path or a directory has no rule file
StatusOr<LoaderCheck> CheckLoaders(const std::string& path, bool json);

}  // namespace weightd
