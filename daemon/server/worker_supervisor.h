#pragma once

#include <sys/types.h>

#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/base/status.h"

namespace weightd {

/// How to start a worker.
struct WorkerCommandLine {
  std::string daemon_socket;  ///< unix socket of the daemon
  std::string runtime_dir;    ///< where the worker puts its own socket
  std::string device;         ///< "host", "host.1" or a GPU UUID
  uint64_t threads = 0;       ///< 0 = one per core
  bool peer_check = true;
  milliseconds attach_deadline{10'000};
  std::string log_level;
  std::string log_format;
};

/// Starts the worker process of one device and starts it again when it dies.
/// Thread safety: all functions from any thread.
class WorkerSupervisor {
 public:
  /// What the supervisor tells. Called from its thread.
  struct Callbacks {
    std::function<void(const std::string& device, const std::string& how)> on_exit;
  };

  WorkerSupervisor(WorkerCommandLine command, milliseconds backoff, Callbacks callbacks);
  /// Ends the process (its socket closes anyway when the daemon ends) and waits for it.
  ~WorkerSupervisor();

  /// Starts the thread. Call once the daemon's socket listens.
  void Start();

  /// From now on the process is not replaced when it ends: the daemon is about to close its socket.
  void LetGo();

  /// The secret that the running worker must present.
  std::string token();
  /// Kills the running worker with SIGKILL.
  void Kill();

  struct View {
    pid_t pid = 0;
    uint32_t restarts = 0;
    std::string last_exit;
  };
  View view();

 private:
  void Run();
  std::string SocketPath(uint32_t generation) const;
  pid_t Spawn(const std::string& token, uint32_t generation);

  const WorkerCommandLine command_;
  const milliseconds backoff_;
  const Callbacks callbacks_;

  std::mutex mu_;
  std::condition_variable changed_;
  bool stopping_ = false;
  std::string token_;
  View view_;
  std::jthread thread_;
};

/// One for each device that is served, by its name.
using WorkerSupervisors = std::map<std::string, std::unique_ptr<WorkerSupervisor>>;

}  // namespace weightd
