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
      ::listen(listener.get(), static_cast<int>(size * kWireLanes)) != 0) {
    return WireError("cannot listen");
  }
  return std::unique_ptr<SocketWire>(new SocketWire(id, rank, size, std::move(listener)));
}

/// Ranks above connect and say which they are, and for which lane, by the number that the own link
/// to rank and lane has there.
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
    uint32_t link = 0;
    if (::recv(stranger.get(), &link, sizeof(link), 0) != sizeof(link)) continue;
    ScopedFd known = std::move(stranger);
    if (PeerOf(link) > rank_ && link < links_.size()) links_[link].fd = std::move(known);
  }
  std::erase_if(strangers_, [](const ScopedFd& fd) { return !fd.valid(); });
  return absl::OkStatus();
}

Status SocketWire::Connect(uint32_t link) {
  ScopedFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd.valid()) return WireError("no socket");
  const auto [address, length] = AddressOf(id_, PeerOf(link));
  // Refused: it does not listen yet.
  if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0) {
    return WouldBlock() || errno == ECONNREFUSED ? absl::OkStatus() : WireError("cannot connect");
  }
  const uint32_t there = LinkOf(rank_, link % kWireLanes);
  if (::send(fd.get(), &there, sizeof(there), MSG_NOSIGNAL) != sizeof(there)) {
    return absl::OkStatus();
  }
  links_[link].fd = std::move(fd);
  return absl::OkStatus();
}

StatusOr<bool> SocketWire::Opened() {
  if (!listener_.valid()) return true;
  WEIGHTD_RETURN_IF_ERROR(AcceptPeers());
  bool all = true;
  for (uint32_t link = 0; link < links_.size(); ++link) {
    const uint32_t peer = PeerOf(link);
    if (peer < rank_ && !links_[link].fd.valid()) WEIGHTD_RETURN_IF_ERROR(Connect(link));
    all = all && (peer == rank_ || links_[link].fd.valid());
  }
  if (all) listener_.Reset();
  return all;
}

Status SocketWire::Start(uint32_t lane, std::span<const WireMessage> group) {
  const uint64_t number = ended_ + open_groups_.size();
  for (const WireMessage& message : group) {
    Link& link = links_[LinkOf(message.peer, lane)];
    (message.send ? link.sends : link.receives).push_back({message.data, message.bytes, number});
  }
  open_groups_.push_back(static_cast<uint32_t>(group.size()));
  return absl::OkStatus();
}

/// Moves as many bytes as the socket takes or has.
void SocketWire::Pump(Link& link, bool send) {
  std::deque<Pending>& queue = send ? link.sends : link.receives;
  while (!queue.empty() && !link.silent) {
    Pending& next = queue.front();
    const ssize_t moved = send ? ::send(link.fd.get(), next.data, next.bytes, MSG_NOSIGNAL)
                               : ::recv(link.fd.get(), next.data, next.bytes, 0);
    if (moved < 0 && WouldBlock()) return;
    if (moved <= 0) {
      link.silent = true;
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
  for (Link& link : links_) {
    Pump(link, true);
    Pump(link, false);
  }
  while (!open_groups_.empty() && open_groups_.front() == 0) {
    open_groups_.pop_front();
    ++ended_;
  }
  return ended_;
}

void SocketWire::Abort() {
  links_.clear();
  open_groups_.clear();
  strangers_.clear();
  listener_.Reset();
}

void SocketWire::AwaitNews(microseconds limit) {
  std::vector<pollfd> fds;
  if (listener_.valid()) fds.push_back({listener_.get(), POLLIN, 0});
  for (const Link& link : links_) {
    if (!link.fd.valid() || link.silent) continue;
    const int events = (link.sends.empty() ? 0 : POLLOUT) | (link.receives.empty() ? 0 : POLLIN);
    if (events != 0) fds.push_back({link.fd.get(), static_cast<int16_t>(events), 0});
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
