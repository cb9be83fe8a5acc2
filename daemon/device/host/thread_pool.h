// A few threads that share out one loop at a time.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace weightd::host {

/// Runs loops on `num_threads` threads, the caller being one of them. Waiting costs no CPU.
/// Thread safety: one ParallelFor at a time; construct and destroy on one thread.
class ThreadPool {
 public:
  /// \pre num_threads >= 1. With 1 everything runs on the caller.
  explicit ThreadPool(int num_threads);
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  /// Joins the threads. \pre no ParallelFor is running
  ~ThreadPool();

  int num_threads() const { return static_cast<int>(threads_.size()) + 1; }

  /// Calls fn(i) once for every i in [0, count), in no particular order, and returns when all calls
  /// have. What they wrote is visible to the caller then. A thread that wakes too late is not
  /// waited for. `fn` must not throw.
  void ParallelFor(size_t count, const std::function<void(size_t)>& fn);

 private:
  void Run();
  void Drain(const std::function<void(size_t)>& fn, size_t count);

  std::atomic<size_t> next_{0};  // the next index to hand out

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable idle_;
  // State below is protected by mutex_.
  const std::function<void(size_t)>* fn_ = nullptr;  // set while a loop can be joined
  size_t count_ = 0;
  uint64_t round_ = 0;  // counts loops, so that a thread joins each at most once
  size_t running_ = 0;  // threads that have joined the current loop and not left it
  bool stopping_ = false;

  std::vector<std::jthread> threads_;  // last: they use everything above
};

}  // namespace weightd::host
