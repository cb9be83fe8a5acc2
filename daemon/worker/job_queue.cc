#include "daemon/worker/job_queue.h"

#include <utility>

namespace weightd {

JobQueue::JobQueue(RunFn run) : run_(std::move(run)), thread_([this] { RunAll(); }) {}

JobQueue::~JobQueue() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    for (const std::unique_ptr<Job>& job : jobs_) job->cancelled.store(true);
  }
  changed_.notify_all();
  thread_.join();
}

void JobQueue::Push(v1::WorkerCommand command) {
  auto job = std::make_unique<Job>();
  job->command = std::move(command);
  if (job->command.run().follows()) {
    for (const uint32_t target : job->command.run().targets()) job->landed[target] = 0;
  }
  {
    const std::lock_guard lock(mutex_);
    jobs_.push_back(std::move(job));
  }
  changed_.notify_all();
}

void JobQueue::ForEach(const std::function<void(Job& job)>& fn) {
  const std::lock_guard lock(mutex_);
  for (const std::unique_ptr<Job>& job : jobs_) fn(*job);
}

void JobQueue::RunAll() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
    if (stopping_) return;
    Job& job = *jobs_.front();
    lock.unlock();
    run_(job);
    lock.lock();
    jobs_.pop_front();
  }
}

}  // namespace weightd
