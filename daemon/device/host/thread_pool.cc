#include "daemon/device/host/thread_pool.h"

namespace weightd::host {

ThreadPool::ThreadPool(int num_threads) {
  for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this] { Run(); });
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
}

void ThreadPool::Drain(const std::function<void(size_t)>& fn, size_t count) {
  while (true) {
    const size_t i = next_.fetch_add(1, std::memory_order_relaxed);
    if (i >= count) return;
    fn(i);
  }
}

void ThreadPool::ParallelFor(size_t count, const std::function<void(size_t)>& fn) {
  if (threads_.empty() || count <= 1) {
    for (size_t i = 0; i < count; ++i) fn(i);
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    fn_ = &fn;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    ++round_;
  }
  wake_.notify_all();
  Drain(fn, count);
  std::unique_lock lock(mutex_);
  fn_ = nullptr;
  idle_.wait(lock, [this] { return running_ == 0; });
}

void ThreadPool::Run() {
  uint64_t seen = 0;
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return stopping_ || (fn_ != nullptr && round_ != seen); });
    if (stopping_) return;
    seen = round_;
    const std::function<void(size_t)>* fn = fn_;
    const size_t count = count_;
    ++running_;
    lock.unlock();
    Drain(*fn, count);
    lock.lock();
    if (--running_ == 0) idle_.notify_all();
  }
}

}  // namespace weightd::host
