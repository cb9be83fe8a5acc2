#include "client/src/event_loop.h"

#include <utility>

namespace weightd {

void EventLoop::Post(std::function<void()> task) {
  const std::lock_guard lock(mutex_);
  tasks_.push_back(std::move(task));
  posted_.notify_one();
}

void EventLoop::Run(const std::function<Clock::time_point()>& advance) {
  while (!stopped_) {
    const Clock::time_point wake = advance();
    if (stopped_) return;
    std::function<void()> task;
    {
      std::unique_lock lock(mutex_);
      const auto ready = [this] { return !tasks_.empty(); };
      if (wake == Clock::time_point::max()) {
        posted_.wait(lock, ready);
      } else if (!posted_.wait_until(lock, wake, ready)) {
        continue;
      }
      task = std::move(tasks_.front());
      tasks_.pop_front();
    }
    task();
  }
}

}  // namespace weightd
