// The worker process: a WorkerCore on the daemon's stream.
#pragma once

#include <string>

namespace weightd {

/// How the daemon starts a worker: `weightd --worker ...`.
struct WorkerOptions {
  std::string device = "host";  ///< whose memory it serves: "host", "host.1" or a GPU UUID
  std::string daemon;       ///< gRPC address of the daemon, e.g. "unix:/run/weightd/weightd.sock"
  std::string token;        ///< proves that this is the daemon's child
  std::string socket_path;  ///< where clients attach
  int num_threads = 0;      ///< that copy; 0 = the cores, at most 8
  int64_t attach_deadline_ms = 10'000;  ///< from a connection until the client is known
  std::string log_level = "info";
  std::string log_format = "text";
  bool check_peer = true;  ///< refuse clients of other users
};

/// Serves the daemon until its stream ends, then ends the process at once. Returns an exit code
/// only if the worker cannot start. Blocks. \pre no other thread of this process is running
int RunWorker(const WorkerOptions& options);

}  // namespace weightd
