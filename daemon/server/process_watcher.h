#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <thread>

#include "daemon/base/scoped_fd.h"
#include "weightd/v1/types.pb.h"

namespace weightd {

/// Tells when a client process dies, by pidfd: also when a forked child keeps its sockets open.
/// Thread safety: all functions from any thread. Callbacks run on the watcher's thread and must not
/// block or call Unwatch.
class ProcessWatcher {
 public:
  ProcessWatcher();
  ~ProcessWatcher();

  /// Watches the process if its pid means something here (same pid namespace). Returns a key for
  /// Unwatch, 0 if it cannot be watched: then only its stream tells of its death.
  uint64_t Watch(const v1::ProcessIdentity& process, std::function<void()> on_exit);

  /// After this returns the callback does not run any more, unless it is running now.
  void Unwatch(uint64_t key);

 private:
  struct Entry {
    ScopedFd pidfd;
    std::function<void()> on_exit;
  };
  void Run(std::stop_token stop);
  void Wake();

  std::mutex mu_;
  std::map<uint64_t, Entry> entries_;
  uint64_t next_key_ = 1;
  ScopedFd wake_;
  uint64_t pid_namespace_ = 0;
  std::jthread thread_;
};

}  // namespace weightd
