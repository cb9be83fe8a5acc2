#include "client/src/dial.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace weightd {
namespace {

constexpr char kDefaultAddress[] = "unix:/run/weightd/weightd.sock";
constexpr char kUnixPrefix[] = "unix:";

int PollMillis(Clock::time_point deadline) {
  const auto left = std::chrono::ceil<milliseconds>(deadline - Clock::now()).count();
  return static_cast<int>(std::clamp<int64_t>(left, 0, 60'000));
}

/// Connects one socket; returns 0 or an errno value.
int Connect(const sockaddr* address, socklen_t size, Clock::time_point deadline, Socket* out) {
  out->fd = ScopedFd(::socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!out->fd.valid()) return errno;
  out->ticket = ForkTicket(out->fd.get());
  while (::connect(out->fd.get(), address, size) != 0) {
    const int error = errno;
    if (error == EINTR) continue;
    if (error == EAGAIN && Clock::now() < deadline) {  // a unix socket whose backlog is full
      ::poll(nullptr, 0, 1);
      continue;
    }
    if (error != EINPROGRESS) return error;
    pollfd entry{out->fd.get(), POLLOUT, 0};
    if (::poll(&entry, 1, PollMillis(deadline)) <= 0) return ETIMEDOUT;
    int result = 0;
    socklen_t length = sizeof(result);
    ::getsockopt(out->fd.get(), SOL_SOCKET, SO_ERROR, &result, &length);
    return result;
  }
  return 0;
}

int ConnectUnix(const std::string& path, Clock::time_point deadline, Socket* out) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof(address.sun_path)) return ENAMETOOLONG;
  std::memcpy(address.sun_path, path.data(), path.size());
  return Connect(reinterpret_cast<const sockaddr*>(&address), sizeof(address), deadline, out);
}

struct AddressesDeleter {
  void operator()(addrinfo* list) const { ::freeaddrinfo(list); }
};

Status Unreachable(const Address& address, std::string_view cause) {
  return MakeError(StatusCode::kUnavailable,
                   fmt::format("no daemon answers: address={} cause={}", address.text, cause),
                   {.reason = reason::kDaemonLost,
                    .peer = "daemon " + address.text,
                    .remedy = "start weightd, or set WEIGHTD_ADDRESS to the address that it "
                              "listens on, and check that this user may open it"});
}

}  // namespace

StatusOr<Address> ParseAddress(std::string text) {
  if (text.empty()) {
    const char* variable = std::getenv("WEIGHTD_ADDRESS");
    text = variable != nullptr && *variable != '\0' ? variable : kDefaultAddress;
  }
  Address address;
  address.text = text;
  if (text.starts_with(kUnixPrefix)) {
    address.unix_path = text.substr(sizeof(kUnixPrefix) - 1);
    if (!address.unix_path.empty()) return address;
  } else if (const size_t colon = text.rfind(':'); colon != std::string::npos && colon > 0) {
    address.host = text.substr(0, colon);
    address.port = text.substr(colon + 1);
    if (address.host.size() > 2 && address.host.front() == '[' && address.host.back() == ']') {
      address.host = address.host.substr(1, address.host.size() - 2);
    }
    const bool digits = std::all_of(address.port.begin(), address.port.end(),
                                    [](unsigned char c) { return isdigit(c); });
    if (!address.port.empty() && digits) return address;
  }
  return Error(StatusCode::kInvalidArgument, reason::kSocket,
               "write the daemon's address as unix:/PATH or HOST:PORT",
               "daemon address cannot be read: address={}", text);
}

StatusOr<Socket> DialDaemon(const Address& address, Clock::time_point deadline) {
  Socket socket;
  if (!address.unix_path.empty()) {
    const int error = ConnectUnix(address.unix_path, deadline, &socket);
    if (error != 0) return Unreachable(address, std::strerror(error));
    return socket;
  }
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* list = nullptr;
  const int failure = ::getaddrinfo(address.host.c_str(), address.port.c_str(), &hints, &list);
  if (failure != 0) return Unreachable(address, ::gai_strerror(failure));
  const std::unique_ptr<addrinfo, AddressesDeleter> owned(list);
  int error = EADDRNOTAVAIL;
  for (const addrinfo* entry = list; entry != nullptr; entry = entry->ai_next) {
    error = Connect(entry->ai_addr, entry->ai_addrlen, deadline, &socket);
    if (error != 0) continue;
    const int on = 1;
    ::setsockopt(socket.fd.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    return socket;
  }
  return Unreachable(address, std::strerror(error));
}

StatusOr<Socket> DialWorker(const std::string& path, Clock::time_point deadline) {
  Socket socket;
  const int error = ConnectUnix(path, deadline, &socket);
  if (error == 0) return socket;
  return Error(StatusCode::kUnavailable, reason::kWorkerLost,
               "see the daemon's log for why its worker ended; check that this process sees the "
               "directory of its socket and may open it",
               "worker cannot be reached: path={} cause={}", path, std::strerror(error));
}

}  // namespace weightd
