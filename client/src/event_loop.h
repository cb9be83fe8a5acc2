// One thread that runs tasks in order: all state of a session belongs to it.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>

#include "daemon/base/clock.h"

namespace weightd {

/// A queue of tasks for the one thread that calls Run.
/// Thread safety: Post may be called by any thread; the others only by the thread in Run.
class EventLoop {
 public:
  /// Queues a task. After Run has returned tasks are kept and never run.
  void Post(std::function<void()> task);

  /// Runs tasks in order until Stop. `advance` is called before every wait and returns the moment
  /// at which it wants to be called again.
  void Run(const std::function<Clock::time_point()>& advance);

  void Stop() { stopped_ = true; }

 private:
  std::mutex mutex_;
  std::condition_variable posted_;
  std::deque<std::function<void()>> tasks_;  // guarded by mutex_
  bool stopped_ = false;                     // belongs to the thread in Run
};

}  // namespace weightd
