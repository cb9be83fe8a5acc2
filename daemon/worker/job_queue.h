// What a worker was asked to do and has not done yet, in order.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "daemon/worker/step_runner.h"
#include "weightd/v1/worker.pb.h"

namespace weightd {

/// One command. Everything but the atomics is constant from Push on.
struct Job {
  v1::WorkerCommand command;
  std::atomic<bool> cancelled{false};
  LandedByTarget landed;  ///< of a verification that follows its transfer
};

/// Runs jobs one after the other on a thread of its own.
/// Thread safety: any thread.
class JobQueue {
 public:
  using RunFn = std::function<void(Job& job)>;

  explicit JobQueue(RunFn run);
  /// Cancels all jobs and waits for the running one; the others are dropped.
  ~JobQueue();

  void Push(v1::WorkerCommand command);
  /// Calls fn for every job that has not ended, the running one included.
  void ForEach(const std::function<void(Job& job)>& fn);

 private:
  void RunAll();

  const RunFn run_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopping_ = false;
  std::deque<std::unique_ptr<Job>> jobs_;  ///< the first is running
  std::jthread thread_;
};

}  // namespace weightd
