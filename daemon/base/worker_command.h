// The command line of a worker, `weightd --worker ...`, as the daemon and the client library start
// it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "daemon/base/clock.h"

namespace weightd {

/// How to start a worker.
struct WorkerCommandLine {
  std::string daemon;       ///< gRPC address of the daemon, e.g. "unix:/run/weightd/weightd.sock"
  std::string device;       ///< "host", "host.1" or a GPU UUID
  std::string socket_path;  ///< where clients attach
  uint64_t threads = 0;     ///< 0 = one per core
  bool peer_check = true;
  milliseconds attach_deadline{10'000};
  std::string log_level;
  std::string log_format;
  /// >= 0: a descriptor whose other end its owner keeps open. At its end the worker ends, too, and
  /// removes the directory of its socket; it closes every other descriptor that it inherits.
  int owner_fd = -1;

  std::vector<std::string> Arguments() const;
  /// `environment` with the secret by which the daemon knows the worker. The environment can be
  /// read by the owner alone, the arguments by all.
  static std::vector<std::string> Environment(std::vector<std::string> environment,
                                              const std::string& token);
};

/// 32 hexadecimal digits that nobody can guess.
std::string RandomToken();

}  // namespace weightd
