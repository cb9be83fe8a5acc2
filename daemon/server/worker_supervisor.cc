#include "daemon/server/worker_supervisor.h"

#include <unistd.h>

#include <utility>

#include "daemon/base/log.h"

namespace weightd {

WorkerSupervisor::WorkerSupervisor(WorkerCommandLine command, std::string runtime_dir,
                                   milliseconds backoff, Callbacks callbacks)
    : command_(std::move(command)),
      runtime_dir_(std::move(runtime_dir)),
      callbacks_(std::move(callbacks)),
      keeper_(backoff, KeeperCallbacks()) {}

std::string WorkerSupervisor::token() {
  const std::lock_guard lock(mu_);
  return token_;
}

std::string WorkerSupervisor::SocketPath(uint32_t generation) const {
  return fmt::format("{}/worker-{}-{}-{}.sock", runtime_dir_, command_.device, ::getpid(),
                     generation);
}

ChildKeeper::Callbacks WorkerSupervisor::KeeperCallbacks() {
  ChildKeeper::Callbacks callbacks;
  callbacks.command = [this](uint32_t generation) -> StatusOr<ChildCommand> {
    const std::lock_guard lock(mu_);
    token_ = RandomToken();
    WorkerCommandLine command = command_;
    command.socket_path = SocketPath(generation);
    return ChildCommand{.program = "/proc/self/exe",
                        .arguments = command.Arguments(),
                        .environment = WorkerCommandLine::Environment(CopyEnvironment(), token_)};
  };
  callbacks.on_start = [this](pid_t pid) {
    spdlog::info("worker started: device={} pid={}", command_.device, pid);
  };
  callbacks.clean_up = [this](uint32_t generation) {
    ::unlink(SocketPath(generation).c_str());  // a killed worker leaves it behind
  };
  callbacks.on_exit = [this](pid_t pid, const std::string& how) {
    spdlog::error("worker died and is started again: device={} pid={} cause={}", command_.device,
                  pid, how);
    callbacks_.on_exit(command_.device, how);
  };
  return callbacks;
}

}  // namespace weightd
