// A child process that is kept running: started, waited for, started again with a backoff. In base
// because the daemon and the client library both keep workers.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/base/status.h"

namespace weightd {

/// How to start a process. It gets no signal mask and the default action of every signal.
struct ChildCommand {
  std::string program;                   ///< path
  std::vector<std::string> arguments;    ///< argv, its first entry included
  std::vector<std::string> environment;  ///< "NAME=value"
  /// Apart from the terminal: a session of its own, no input, output to standard error.
  bool detached = false;
  int passed_fd = -1;  ///< becomes kPassedFd of the child; -1 = none
};

/// Keeps one child process running until LetGo. Waits for that process and no other, and goes on if
/// other code of this process takes its exit status. The thread that starts it lives as long as the
/// child, as PR_SET_PDEATHSIG needs.
/// Thread safety: all functions from any thread.
class ChildKeeper {
 public:
  static constexpr int kPassedFd = 3;

  struct Callbacks {
    /// The next start, counted from 0. Called with the keeper locked: must not call it. An error
    /// counts as a child that has ended.
    std::function<StatusOr<ChildCommand>(uint32_t generation)> command;
    /// It runs. Keeper locked, as above.
    std::function<void(pid_t pid)> on_start;
    /// It has ended and is reaped: removes what it may have left. From the keeper's thread.
    std::function<void(uint32_t generation)> clean_up;
    /// It has ended and is started again. `how`: "exit code 1", "signal 9". From the keeper's
    /// thread.
    std::function<void(pid_t pid, const std::string& how)> on_exit;
  };

  /// `backoff`: before a child that had lived for 5 s is replaced; doubles up to 5 s for one that
  /// dies sooner.
  ChildKeeper(milliseconds backoff, Callbacks callbacks);
  /// Kills the child with SIGKILL and waits for its end.
  ~ChildKeeper();

  /// Starts the thread. Call once.
  void Start();
  /// From now on the child is not replaced when it ends.
  void LetGo();
  /// Kills the running child with SIGKILL.
  void Kill();

  struct View {
    pid_t pid = 0;  ///< 0 while none runs
    uint32_t restarts = 0;
    std::string last_exit;
  };
  View view();

 private:
  void Run();
  StatusOr<pid_t> StartChild(uint32_t generation);
  std::string Reap(pid_t pid, std::unique_lock<std::mutex>& lock);

  const milliseconds backoff_;
  const Callbacks callbacks_;

  std::mutex mu_;
  std::condition_variable changed_;
  bool stopping_ = false;
  View view_;
  std::jthread thread_;
};

/// The environment of this process. Not safe beside a thread that changes it.
std::vector<std::string> CopyEnvironment();

}  // namespace weightd
