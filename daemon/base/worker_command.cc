#include "daemon/base/worker_command.h"

#include <fmt/format.h>

#include <random>

namespace weightd {
namespace {

constexpr char kTokenVariable[] = "WEIGHTD_WORKER_TOKEN=";

}  // namespace

std::vector<std::string> WorkerCommandLine::Arguments() const {
  std::vector<std::string> arguments = {"weightd",
                                        "--worker",
                                        "--device",
                                        device,
                                        "--daemon",
                                        daemon,
                                        "--socket",
                                        socket_path,
                                        "--threads",
                                        std::to_string(threads),
                                        "--attach-deadline-ms",
                                        std::to_string(attach_deadline.count()),
                                        "--log-level",
                                        log_level,
                                        "--log-format",
                                        log_format};
  if (!peer_check) arguments.emplace_back("--no-peer-check");
  if (owner_fd >= 0) {
    arguments.emplace_back("--owner-fd");
    arguments.push_back(std::to_string(owner_fd));
  }
  return arguments;
}

std::vector<std::string> WorkerCommandLine::Environment(std::vector<std::string> environment,
                                                        const std::string& token) {
  std::erase_if(environment, [](const auto& entry) { return entry.starts_with(kTokenVariable); });
  environment.push_back(kTokenVariable + token);
  return environment;
}

std::string RandomToken() {
  std::random_device device;
  return fmt::format("{:08x}{:08x}{:08x}{:08x}", device(), device(), device(), device());
}

}  // namespace weightd
