// The worker process: a WorkerCore on the daemon's stream. Its parent, the daemon or a client, may
// end before it: then it ends, too.
#pragma once

#include <string>

namespace weightd {

/// How the daemon or a client starts a worker: `weightd --worker ...`.
struct WorkerOptions {
  std::string device = "host";  ///< whose memory it serves: "host", "host.1" or a GPU UUID
  std::string daemon;       ///< gRPC address of the daemon, e.g. "unix:/run/weightd/weightd.sock"
  std::string token;        ///< proves who started it
  std::string socket_path;  ///< where clients attach
  int num_threads = 0;      ///< that copy; 0 = the cores, at most 8
  int64_t attach_deadline_ms = 10'000;  ///< from a connection until the client is known
  std::string log_level = "info";
  std::string log_format = "text";
  bool check_peer = true;  ///< refuse clients of other users
  /// >= 0: started by a client. The worker ends when the other end of this descriptor closes, and
  /// removes the directory of its socket.
  int owner_fd = -1;
};

/// Serves the daemon until its stream ends, then ends the process at once. Returns an exit code
/// only if the worker cannot start. Blocks. \pre no other thread of this process is running
int RunWorker(const WorkerOptions& options);

}  // namespace weightd
