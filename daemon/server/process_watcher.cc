#include "daemon/server/process_watcher.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <vector>

namespace weightd {
namespace {

uint64_t PidNamespace() {
  struct stat info {};
  return ::stat("/proc/self/ns/pid", &info) == 0 ? info.st_ino : 0;
}

}  // namespace

ProcessWatcher::ProcessWatcher()
    : wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      pid_namespace_(PidNamespace()),
      thread_([this](std::stop_token stop) { Run(std::move(stop)); }) {}

ProcessWatcher::~ProcessWatcher() {
  thread_.request_stop();
  Wake();
}

void ProcessWatcher::Wake() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = ::write(wake_.get(), &one, sizeof one);
}

uint64_t ProcessWatcher::Watch(const v1::ProcessIdentity& process, std::function<void()> on_exit) {
  if (process.pid_namespace() == 0 || process.pid_namespace() != pid_namespace_) return 0;
  ScopedFd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, process.pid(), 0)));
  if (!pidfd.valid()) return 0;
  uint64_t key = 0;
  {
    const std::lock_guard lock(mu_);
    key = next_key_++;
    entries_[key] = {std::move(pidfd), std::move(on_exit)};
  }
  Wake();
  return key;
}

void ProcessWatcher::Unwatch(uint64_t key) {
  if (key == 0) return;
  const std::lock_guard lock(mu_);
  entries_.erase(key);
  Wake();
}

// NOLINTNEXTLINE(performance-unnecessary-value-param): as std::jthread hands it over
void ProcessWatcher::Run(std::stop_token stop) {
  while (!stop.stop_requested()) {
    std::vector<pollfd> fds{{wake_.get(), POLLIN, 0}};
    std::vector<uint64_t> keys{0};
    {
      const std::lock_guard lock(mu_);
      for (const auto& [key, entry] : entries_) {
        fds.push_back({entry.pidfd.get(), POLLIN, 0});
        keys.push_back(key);
      }
    }
    if (::poll(fds.data(), fds.size(), -1) < 0) continue;
    uint64_t drained = 0;
    [[maybe_unused]] const ssize_t got = ::read(wake_.get(), &drained, sizeof drained);
    for (size_t i = 1; i < fds.size(); ++i) {
      if (fds[i].revents == 0) continue;
      std::function<void()> on_exit;
      {
        const std::lock_guard lock(mu_);
        const auto it = entries_.find(keys[i]);
        // A number may have been closed and opened again since poll was set up: then it is not this
        // entry's event.
        if (it == entries_.end() || it->second.pidfd.get() != fds[i].fd) continue;
        on_exit = std::move(it->second.on_exit);
        entries_.erase(it);
      }
      on_exit();
    }
  }
}

}  // namespace weightd
