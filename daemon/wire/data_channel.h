// The framed data socket between a client and its worker: DataFrame messages with the file
// descriptors that they name. Used by both ends.
#pragma once

#include <sys/socket.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/base/scoped_fd.h"
#include "daemon/base/status.h"
#include "weightd/v1/worker.pb.h"

namespace weightd {

/// Largest frame body in bytes; a longer length is refused before anything is allocated.
inline constexpr size_t kMaxFrameBytes = 4u << 20;
/// Most descriptors with one frame (the kernel takes 253).
inline constexpr size_t kMaxFrameFds = 250;

/// A frame and the descriptors that came with it, in order.
struct ReceivedFrame {
  v1::DataFrame frame;
  std::vector<ScopedFd> fds;
};

/// One end of a data socket. A frame is a 4-byte little-endian length and that many bytes of
/// DataFrame; descriptors travel with its first byte. After any error but DEADLINE the channel is
/// of no use: close it. After a DEADLINE of Receive the bytes that came are kept and Receive may be
/// called again; a DEADLINE of Send may have sent a part, so the channel must be closed. Thread
/// safety: one sender and one receiver at a time. Shutdown may be called by any thread.
class DataChannel {
 public:
  DataChannel() = default;
  /// Takes a connected SOCK_STREAM unix socket and makes it non-blocking.
  explicit DataChannel(ScopedFd socket);
  DataChannel(DataChannel&&) noexcept = default;
  DataChannel& operator=(DataChannel&&) noexcept = default;

  /// Connects to a worker's socket. Blocks until it accepts or the deadline.
  /// \error UNAVAILABLE SOCKET naming the path if nothing listens there or access is denied
  static StatusOr<DataChannel> Connect(const std::string& path, Clock::time_point deadline);

  bool valid() const { return socket_.valid(); }
  int fd() const { return socket_.get(); }
  /// Process on the other end, by SO_PEERCRED. \error INTERNAL SOCKET
  StatusOr<ucred> PeerCredentials() const;

  /// Sends one frame; the caller keeps the descriptors. Blocks.
  /// \error INVALID_ARGUMENT MESSAGE_TOO_LARGE for a larger frame or more than kMaxFrameFds
  /// \error UNAVAILABLE PEER_LOST if the other end has closed, DEADLINE_EXCEEDED DEADLINE
  Status Send(const v1::DataFrame& frame, Clock::time_point deadline, const std::vector<int>& fds);
  Status Send(const v1::DataFrame& frame, Clock::time_point deadline) {
    return Send(frame, deadline, {});
  }

  /// Receives one frame. Blocks. A deadline that has passed reads what is there already.
  /// \error INVALID_ARGUMENT PROTOCOL for bytes that are no frame or too many descriptors
  /// \error INVALID_ARGUMENT MESSAGE_TOO_LARGE for a length above kMaxFrameBytes
  /// \error RESOURCE_EXHAUSTED FILE_DESCRIPTORS if descriptors were lost to this process's limit
  /// \error UNAVAILABLE PEER_LOST if the other end has closed, DEADLINE_EXCEEDED DEADLINE
  StatusOr<ReceivedFrame> Receive(Clock::time_point deadline);

  /// Ends both directions; a blocked Send or Receive returns PEER_LOST.
  void Shutdown();
  void Close();

 private:
  Status ReadSome();
  StatusOr<bool> TakeFrame(ReceivedFrame* out);
  Status WaitFor(short events, Clock::time_point deadline, const char* what) const;

  ScopedFd socket_;
  std::string inbox_;                ///< bytes of the frame under way
  std::vector<ScopedFd> inbox_fds_;  ///< descriptors of the frame under way
};

}  // namespace weightd
