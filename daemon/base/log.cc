#include "daemon/base/log.h"

#include <spdlog/sinks/stdout_sinks.h>

namespace weightd {

void InitLog(const std::string& level, const std::string& format, const std::string& role) {
  auto logger =
      std::make_shared<spdlog::logger>(role, std::make_shared<spdlog::sinks::stderr_sink_mt>());
  if (format == "json") {
    logger->set_pattern(
        R"({"time":"%Y-%m-%dT%H:%M:%S.%f%z","level":"%l","role":"%n","pid":%P,"message":"%v"})");
  } else {
    logger->set_pattern("%Y-%m-%dT%H:%M:%S.%f%z %-5l %n[%P] %v");
  }
  logger->set_level(spdlog::level::from_str(level == "warning" ? "warn" : level));
  logger->flush_on(spdlog::level::info);
  spdlog::set_default_logger(std::move(logger));
}

}  // namespace weightd
