#include "daemon/transport/socket/socket_wire.h"

#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

namespace weightd {
namespace {

constexpr size_t kIdBytes = 32;  // hexadecimal

Status WireError(std::string_view what) {
  return Error(StatusCode::kUnavailable, reason::kWire, "sync again", "wire of sockets: {}: {}",
               what, std::strerror(errno));
}

/// The abstract address of one rank, and its length.
std::pair<sockaddr_un, socklen_t> AddressOf(const std::string& id, uint32_t rank) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string name = fmt::format("weightd-wire-{}-{}", id, rank);
  name.copy(address.sun_path + 1, sizeof(address.sun_path) - 1);
  return {address, static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size())};
}

bool SameUser(int fd) {
  ucred peer{};
  socklen_t size = sizeof(peer);
  return ::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && peer.uid == ::geteuid();
}

bool WouldBlock() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

}  // namespace

StatusOr<std::unique_ptr<SocketWire>> SocketWire::Create(const std::string& id, uint32_t rank,
                                                         uint32_t size) {
  ScopedFd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  const auto [address, length] = AddressOf(id, rank);
  if (::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0 ||
      ::listen(listener.get(), static_cast<int>(size)) != 0) {
    return WireError("cannot listen");
  }
  return std::unique_ptr<SocketWire>(new SocketWire(id, rank, size, std::move(listener)));
}

/// Ranks above connect and say which they are.
Status SocketWire::AcceptPeers() {
  while (true) {
    ScopedFd fd(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!fd.valid()) {
      if (!WouldBlock()) return WireError("cannot accept a peer");
      break;
    }
    if (SameUser(fd.get())) strangers_.push_back(std::move(fd));
  }
  for (ScopedFd& stranger : strangers_) {
    uint32_t rank = 0;
    if (::recv(stranger.get(), &rank, sizeof(rank), 0) != sizeof(rank)) continue;
    ScopedFd known = std::move(stranger);
    if (rank > rank_ && rank < peers_.size()) peers_[rank].fd = std::move(known);
  }
  std::erase_if(strangers_, [](const ScopedFd& fd) { return !fd.valid(); });
  return absl::OkStatus();
}

Status SocketWire::Connect(uint32_t peer) {
  ScopedFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd.valid()) return WireError("no socket");
  const auto [address, length] = AddressOf(id_, peer);
  // Refused: it does not listen yet.
  if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0) {
    return WouldBlock() || errno == ECONNREFUSED ? absl::OkStatus() : WireError("cannot connect");
  }
  if (::send(fd.get(), &rank_, sizeof(rank_), MSG_NOSIGNAL) != sizeof(rank_)) {
    return absl::OkStatus();
  }
  peers_[peer].fd = std::move(fd);
  return absl::OkStatus();
}

StatusOr<bool> SocketWire::Opened() {
  if (!listener_.valid()) return true;
  WEIGHTD_RETURN_IF_ERROR(AcceptPeers());
  bool all = true;
  for (uint32_t peer = 0; peer < peers_.size(); ++peer) {
    if (peer < rank_ && !peers_[peer].fd.valid()) WEIGHTD_RETURN_IF_ERROR(Connect(peer));
    all = all && (peer == rank_ || peers_[peer].fd.valid());
  }
  if (all) listener_.Reset();
  return all;
}

Status SocketWire::Start(std::span<const WireMessage> group) {
  const uint64_t number = ended_ + open_groups_.size();
  for (const WireMessage& message : group) {
    Peer& peer = peers_[message.peer];
    (message.send ? peer.sends : peer.receives).push_back({message.data, message.bytes, number});
  }
  open_groups_.push_back(static_cast<uint32_t>(group.size()));
  return absl::OkStatus();
}

/// Moves as many bytes as the socket takes or has.
void SocketWire::Pump(Peer& peer, bool send) {
  std::deque<Pending>& queue = send ? peer.sends : peer.receives;
  while (!queue.empty() && !peer.silent) {
    Pending& next = queue.front();
    const ssize_t moved = send ? ::send(peer.fd.get(), next.data, next.bytes, MSG_NOSIGNAL)
                               : ::recv(peer.fd.get(), next.data, next.bytes, 0);
    if (moved < 0 && WouldBlock()) return;
    if (moved <= 0) {
      peer.silent = true;
      return;
    }
    next.data += moved;
    next.bytes -= static_cast<uint64_t>(moved);
    if (next.bytes > 0) continue;
    --open_groups_[next.group - ended_];
    queue.pop_front();
  }
}

StatusOr<uint64_t> SocketWire::Ended() {
  for (Peer& peer : peers_) {
    Pump(peer, true);
    Pump(peer, false);
  }
  while (!open_groups_.empty() && open_groups_.front() == 0) {
    open_groups_.pop_front();
    ++ended_;
  }
  return ended_;
}

void SocketWire::Abort() {
  peers_.clear();
  open_groups_.clear();
  strangers_.clear();
  listener_.Reset();
}

void SocketWire::AwaitNews(microseconds limit) {
  std::vector<pollfd> fds;
  if (listener_.valid()) fds.push_back({listener_.get(), POLLIN, 0});
  for (const Peer& peer : peers_) {
    if (!peer.fd.valid() || peer.silent) continue;
    const int events = (peer.sends.empty() ? 0 : POLLOUT) | (peer.receives.empty() ? 0 : POLLIN);
    if (events != 0) fds.push_back({peer.fd.get(), static_cast<int16_t>(events), 0});
  }
  const timespec timeout{limit.count() / 1'000'000, limit.count() % 1'000'000 * 1000};
  ::ppoll(fds.data(), fds.size(), &timeout, nullptr);
}

StatusOr<std::string> SocketWireMaker::MakeId() {
  std::array<uint8_t, kIdBytes / 2> bytes{};
  if (::getrandom(bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
    return WireError("no random bytes");
  }
  return fmt::format("{:02x}", fmt::join(bytes, ""));
}

StatusOr<std::unique_ptr<Wire>> SocketWireMaker::Open(const std::string& id, uint32_t rank,
                                                      uint32_t size) {
  if (id.size() != kIdBytes || rank >= size) {
    return Error(StatusCode::kInvalidArgument, reason::kProtocol,
                 "run daemon and worker from the same release",
                 "wire has an id that is not of sockets: bytes={}", id.size());
  }
  return SocketWire::Create(id, rank, size);
}

}  // namespace weightd
