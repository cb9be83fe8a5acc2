#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "daemon/base/child_keeper.h"
#include "daemon/base/worker_command.h"

namespace weightd {

/// Starts the worker process of one device and starts it again when it dies.
/// Thread safety: all functions from any thread.
class WorkerSupervisor {
 public:
  using View = ChildKeeper::View;

  /// What the supervisor tells. Called from its thread.
  struct Callbacks {
    std::function<void(const std::string& device, const std::string& how)> on_exit;
  };

  /// `command` without its socket path: each start gets one of its own in `runtime_dir`.
  WorkerSupervisor(WorkerCommandLine command, std::string runtime_dir, milliseconds backoff,
                   Callbacks callbacks);
  // The destructor ends the process (its socket closes anyway when the daemon ends) and waits.

  /// Starts the thread. Call once the daemon's socket listens.
  void Start() { keeper_.Start(); }

  /// From now on the process is not replaced when it ends: the daemon is about to close its socket.
  void LetGo() { keeper_.LetGo(); }

  /// The secret that the running worker must present.
  std::string token();
  /// Kills the running worker with SIGKILL.
  void Kill() { keeper_.Kill(); }

  View view() { return keeper_.view(); }

 private:
  ChildKeeper::Callbacks KeeperCallbacks();
  std::string SocketPath(uint32_t generation) const;

  const WorkerCommandLine command_;
  const std::string runtime_dir_;
  const Callbacks callbacks_;

  std::mutex mu_;
  std::string token_;  // guarded by mu_

  ChildKeeper keeper_;  // last: its thread uses the rest
};

/// One for each device that is served, by its name.
using WorkerSupervisors = std::map<std::string, std::unique_ptr<WorkerSupervisor>>;

}  // namespace weightd
