// Logging: one process-wide spdlog logger. Log once, where a Status is finally handled; key=value
// at the end.
#pragma once

#include <spdlog/spdlog.h>

#include <string>

namespace weightd {

/// Sets level ("debug", "info", "warn", "error") and format ("text" or "json") of the process
/// logger, which writes to standard error. `role` goes into every line ("daemon", "worker host").
/// \pre level and format are valid; the configuration is checked before.
void InitLog(const std::string& level, const std::string& format, const std::string& role);

}  // namespace weightd
