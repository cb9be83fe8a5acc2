#include "daemon/wire/data_channel.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/un.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

namespace weightd {
namespace {

constexpr size_t kHeaderBytes = 4;
constexpr size_t kReadBytes = 64u << 10;
constexpr char kReattach[] = "attach again with this release's client library";

Status PeerGone(int error) {
  return Error(StatusCode::kUnavailable, reason::kPeerLost, "attach again once the peer is back",
               "other end of the data socket has closed: {}",
               error == 0 ? "end of file" : std::strerror(error));
}

uint32_t ReadLength(const char* bytes) {
  std::array<uint8_t, kHeaderBytes> raw;
  std::memcpy(raw.data(), bytes, kHeaderBytes);
  return uint32_t{raw[0]} | uint32_t{raw[1]} << 8 | uint32_t{raw[2]} << 16 | uint32_t{raw[3]} << 24;
}

int PollMillis(Clock::time_point deadline) {
  if (deadline == Clock::time_point::max()) return -1;
  const auto left = std::chrono::ceil<milliseconds>(deadline - Clock::now()).count();
  return static_cast<int>(std::clamp<int64_t>(left, 0, 60'000));
}

/// Takes the descriptors of a received message; closes nothing.
Status TakeFds(const msghdr& message, std::vector<ScopedFd>* fds) {
  for (const cmsghdr* part = CMSG_FIRSTHDR(&message); part != nullptr;
       part = CMSG_NXTHDR(const_cast<msghdr*>(&message), const_cast<cmsghdr*>(part))) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(part) + i * sizeof(int), sizeof(int));
      fds->emplace_back(fd);
    }
  }
  if ((message.msg_flags & MSG_CTRUNC) != 0) {
    return Error(StatusCode::kResourceExhausted, reason::kFileDescriptors,
                 "raise the soft limit of open files (ulimit -n) of the receiving process",
                 "file descriptors of a data frame were lost: received={}", fds->size());
  }
  if (fds->size() > kMaxFrameFds) {
    return Error(StatusCode::kInvalidArgument, reason::kProtocol, kReattach,
                 "data frame carries too many descriptors: got={} limit={}", fds->size(),
                 kMaxFrameFds);
  }
  return absl::OkStatus();
}

}  // namespace

DataChannel::DataChannel(ScopedFd socket) : socket_(std::move(socket)) {
  const int flags = ::fcntl(socket_.get(), F_GETFL);
  if (flags >= 0) ::fcntl(socket_.get(), F_SETFL, flags | O_NONBLOCK);
}

StatusOr<DataChannel> DataChannel::Connect(const std::string& path, Clock::time_point deadline) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path)) {
    return Error(StatusCode::kInvalidArgument, reason::kSocket,
                 "choose a runtime directory with a shorter path",
                 "worker socket path is empty or too long: path={} limit={}", path,
                 sizeof(address.sun_path) - 1);
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  ScopedFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  while (::connect(socket.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) {
    const int error = errno;
    const bool again = error == EAGAIN || error == EINTR;  // EAGAIN: its backlog is full
    if (!again || Clock::now() >= deadline) {
      return Error(StatusCode::kUnavailable, reason::kSocket,
                   "check that the worker runs and that this user may open its socket",
                   "worker cannot be reached: path={} error={}", path, std::strerror(error));
    }
    ::poll(nullptr, 0, 1);
  }
  return DataChannel(std::move(socket));
}

StatusOr<ucred> DataChannel::PeerCredentials() const {
  ucred credentials{};
  socklen_t size = sizeof(credentials);
  if (::getsockopt(socket_.get(), SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) {
    return Error(StatusCode::kInternal, reason::kSocket,
                 "start the worker with --no-peer-check if its sockets have no credentials",
                 "credentials of the peer cannot be read: {}", std::strerror(errno));
  }
  return credentials;
}

Status DataChannel::WaitFor(short events, Clock::time_point deadline, const char* what) const {
  while (true) {
    pollfd entry{socket_.get(), events, 0};
    const int ready = ::poll(&entry, 1, PollMillis(deadline));
    if (ready > 0) return absl::OkStatus();
    if (ready < 0 && errno != EINTR) return PeerGone(errno);
    if (Clock::now() >= deadline) {
      return Error(StatusCode::kDeadlineExceeded, reason::kDeadline,
                   "check that the peer is running and not stopped",
                   "data socket did not become ready to {} in time", what);
    }
  }
}

Status DataChannel::Send(const v1::DataFrame& frame, Clock::time_point deadline,
                         const std::vector<int>& fds) {
  const size_t size = frame.ByteSizeLong();
  if (size > kMaxFrameBytes || fds.size() > kMaxFrameFds) {
    return Error(StatusCode::kInvalidArgument, reason::kMessageTooLarge,
                 "split the message into several frames",
                 "data frame is too large: bytes={} limit={} descriptors={} limit={}", size,
                 kMaxFrameBytes, fds.size(), kMaxFrameFds);
  }
  std::string bytes(kHeaderBytes, '\0');
  for (size_t i = 0; i < kHeaderBytes; ++i) bytes[i] = static_cast<char>(size >> (8 * i) & 0xff);
  frame.AppendToString(&bytes);
  alignas(cmsghdr) std::array<char, CMSG_SPACE(kMaxFrameFds * sizeof(int))> control{};
  size_t sent = 0;
  while (sent < bytes.size()) {
    iovec part{bytes.data() + sent, bytes.size() - sent};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    if (sent == 0 && !fds.empty()) {
      message.msg_control = control.data();
      message.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
      cmsghdr* header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
      std::memcpy(CMSG_DATA(header), fds.data(), fds.size() * sizeof(int));
    }
    const ssize_t count = ::sendmsg(socket_.get(), &message, MSG_NOSIGNAL);
    if (count >= 0) {
      sent += static_cast<size_t>(count);
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      WEIGHTD_RETURN_IF_ERROR(WaitFor(POLLOUT, deadline, "write"));
    } else if (errno == ETOOMANYREFS && Clock::now() < deadline) {
      ::poll(nullptr, 0, 1);  // too many descriptors in flight: the receiver has to take some first
    } else if (errno != EINTR) {
      return PeerGone(errno);
    }
  }
  return absl::OkStatus();
}

/// Reads what is there, at most to the end of the frame under way: descriptors of the next frame
/// never mix with those of this one.
Status DataChannel::ReadSome() {
  size_t wanted = kHeaderBytes - std::min(kHeaderBytes, inbox_.size());
  if (wanted == 0) wanted = kHeaderBytes + ReadLength(inbox_.data()) - inbox_.size();
  wanted = std::min(wanted, kReadBytes);
  const size_t old_size = inbox_.size();
  inbox_.resize(old_size + wanted);
  alignas(cmsghdr) std::array<char, CMSG_SPACE(253 * sizeof(int))> control;
  iovec part{inbox_.data() + old_size, wanted};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  const ssize_t count = ::recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  const int error = errno;
  inbox_.resize(old_size + (count > 0 ? static_cast<size_t>(count) : 0));
  if (count == 0) return PeerGone(0);
  if (count > 0) return TakeFds(message, &inbox_fds_);
  if (error == EINTR) return absl::OkStatus();
  if (error == EAGAIN || error == EWOULDBLOCK) return Status(StatusCode::kDeadlineExceeded, "");
  return PeerGone(error);
}

/// True if the inbox held a whole frame, which is then in `out`.
StatusOr<bool> DataChannel::TakeFrame(ReceivedFrame* out) {
  if (inbox_.size() < kHeaderBytes) return false;
  const size_t size = ReadLength(inbox_.data());
  if (size > kMaxFrameBytes) {
    return Error(StatusCode::kInvalidArgument, reason::kMessageTooLarge, kReattach,
                 "data frame is too large: bytes={} limit={}", size, kMaxFrameBytes);
  }
  if (inbox_.size() < kHeaderBytes + size) return false;
  const bool parsed =
      out->frame.ParseFromArray(inbox_.data() + kHeaderBytes, static_cast<int>(size));
  inbox_.clear();
  inbox_.shrink_to_fit();
  out->fds = std::move(inbox_fds_);
  inbox_fds_.clear();
  if (!parsed) {
    return Error(StatusCode::kInvalidArgument, reason::kProtocol, kReattach,
                 "data frame cannot be parsed: bytes={}", size);
  }
  return true;
}

StatusOr<ReceivedFrame> DataChannel::Receive(Clock::time_point deadline) {
  ReceivedFrame received;
  while (true) {
    WEIGHTD_ASSIGN_OR_RETURN(const bool whole, TakeFrame(&received));
    if (whole) return received;
    const Status read = ReadSome();
    if (read.ok()) continue;
    if (read.code() != StatusCode::kDeadlineExceeded) return read;
    WEIGHTD_RETURN_IF_ERROR(WaitFor(POLLIN, deadline, "read"));
  }
}

void DataChannel::Shutdown() {
  if (socket_.valid()) ::shutdown(socket_.get(), SHUT_RDWR);
}

void DataChannel::Close() {
  socket_.Reset();
  inbox_.clear();
  inbox_fds_.clear();
}

}  // namespace weightd
