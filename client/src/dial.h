// Addresses of daemons and workers, and sockets to them.
#pragma once

#include <string>

#include "client/src/fork_guard.h"
#include "daemon/base/clock.h"
#include "daemon/base/scoped_fd.h"
#include "daemon/base/status.h"

namespace weightd {

/// Where a daemon listens.
struct Address {
  std::string unix_path;  ///< not empty: a unix socket
  std::string host;       ///< otherwise TCP
  std::string port;
  std::string text;  ///< as the user gave it, for messages
};

/// `text` empty: $WEIGHTD_ADDRESS, then "unix:/run/weightd/weightd.sock".
/// \error INVALID_ARGUMENT SOCKET if it is neither "unix:/PATH" nor "HOST:PORT"
StatusOr<Address> ParseAddress(std::string text);

/// A connected socket that no forked or executed child keeps.
struct Socket {
  ScopedFd fd;
  ForkTicket ticket;
};

/// Connects. Blocks up to the deadline. The socket is non-blocking.
/// \error UNAVAILABLE DAEMON_LOST naming address and cause
StatusOr<Socket> DialDaemon(const Address& address, Clock::time_point deadline);

/// Connects to a worker's unix socket. The socket is non-blocking.
/// \error UNAVAILABLE WORKER_LOST naming path and cause
StatusOr<Socket> DialWorker(const std::string& path, Clock::time_point deadline);

}  // namespace weightd
