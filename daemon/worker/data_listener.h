// The worker's own unix socket, on which clients attach.
#pragma once

#include <string>

#include "daemon/base/scoped_fd.h"
#include "daemon/base/status.h"
#include "daemon/wire/data_channel.h"

namespace weightd {

/// Owns the listening socket and its path, which is removed at the end. Thread safety: none.
class DataListener {
 public:
  /// Listens at `path` with mode 0600. A path that a dead worker left behind is replaced.
  /// \error UNAVAILABLE SOCKET naming the path if it is in use, not writable or too long
  static StatusOr<DataListener> Create(const std::string& path);
  DataListener(DataListener&&) noexcept = default;
  DataListener& operator=(DataListener&&) = delete;
  ~DataListener();

  int fd() const { return socket_.get(); }
  /// The next client that waits. \error DEADLINE_EXCEEDED if there is none, RESOURCE_EXHAUSTED
  /// FILE_DESCRIPTORS
  StatusOr<DataChannel> Accept();

 private:
  DataListener(ScopedFd socket, std::string path);
  ScopedFd socket_;
  std::string path_;
};

/// Checks that the process on the other end runs as this user or as root.
/// \error PERMISSION_DENIED SOCKET naming both users
Status CheckPeerUser(const DataChannel& channel);

}  // namespace weightd
