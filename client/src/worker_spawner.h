// The worker that this client runs as its own child, when the daemon asks it to.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "client/src/fork_guard.h"
#include "daemon/base/child_keeper.h"
#include "daemon/base/scoped_fd.h"
#include "daemon/base/status.h"
#include "weightd/v1/types.pb.h"

namespace weightd {

/// What it takes to start a worker; read once, when the client is opened.
struct SpawnSettings {
  std::string binary;                    ///< absolute path of weightd
  std::vector<std::string> environment;  ///< of the client at that time
};

/// Runs one worker at a time. The child has a session and a temporary directory of its own, and
/// inherits no descriptor but the standard streams and one end of a socket pair, by which it sees
/// that the client is gone. Signals of this process, other children and their exit statuses are not
/// touched.
/// Thread safety: one thread, except that `on_end` is called by the spawner's.
class WorkerSpawner {
 public:
  /// The worker of the order that was given as `order` has ended and is started again: `how`.
  using EndFn = std::function<void(uint64_t order, const std::string& how)>;

  WorkerSpawner(SpawnSettings settings, std::string daemon, EndFn on_end);
  ~WorkerSpawner();
  WorkerSpawner(const WorkerSpawner&) = delete;
  WorkerSpawner& operator=(const WorkerSpawner&) = delete;

  /// Starts the worker that is ordered, in place of the one that runs.
  void Start(const v1::StartWorker& order, uint64_t number);
  /// Kills the worker; it is started again.
  void Kill();
  /// Kills the worker and waits until it is gone, and its directory.
  void Stop();

 private:
  struct Run;
  const SpawnSettings settings_;
  const std::string daemon_;
  const EndFn on_end_;
  std::unique_ptr<Run> run_;
};

/// Makes a directory that only this user may enter, for a socket: in $XDG_RUNTIME_DIR if that can
/// be written and leaves room for the name of a socket, else in /tmp.
/// \error FAILED_PRECONDITION WORKER_START naming both if neither can be written
StatusOr<std::string> MakeSocketFolder(const std::string& xdg_runtime_dir);

}  // namespace weightd
