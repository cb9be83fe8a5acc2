#include "daemon/worker/data_listener.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace weightd {
namespace {

Status SocketError(const std::string& path, std::string_view what) {
  return Error(StatusCode::kUnavailable, reason::kSocket,
               "set runtime_dir to a directory of this user that no other daemon uses",
               "worker socket cannot be opened: path={} error={}", path, what);
}

sockaddr_un AddressOf(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

/// Removes a socket on which nobody listens.
Status RemoveStale(const std::string& path) {
  struct stat info {};
  if (::lstat(path.c_str(), &info) != 0) return absl::OkStatus();
  if (!S_ISSOCK(info.st_mode)) return SocketError(path, "a file that is no socket is in the way");
  const sockaddr_un address = AddressOf(path);
  const ScopedFd probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  const int result =
      ::connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address));
  if (result == 0 || errno != ECONNREFUSED) {
    return SocketError(path, result == 0 ? "in use by a live process" : std::strerror(errno));
  }
  if (::unlink(path.c_str()) != 0) return SocketError(path, std::strerror(errno));
  return absl::OkStatus();
}

}  // namespace

DataListener::DataListener(ScopedFd socket, std::string path)
    : socket_(std::move(socket)), path_(std::move(path)) {}

DataListener::~DataListener() {
  if (socket_.valid()) ::unlink(path_.c_str());
}

StatusOr<DataListener> DataListener::Create(const std::string& path) {
  if (path.empty() || path.size() >= sizeof(sockaddr_un::sun_path)) {
    return SocketError(path, "empty or longer than 107 bytes");
  }
  WEIGHTD_RETURN_IF_ERROR(RemoveStale(path));
  const sockaddr_un address = AddressOf(path);
  ScopedFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  // The mode of the socket becomes that of the path: there is no moment with another one.
  if (!socket.valid() || ::fchmod(socket.get(), S_IRUSR | S_IWUSR) != 0 ||
      ::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    return SocketError(path, std::strerror(errno));
  }
  DataListener listener(std::move(socket), path);
  if (::listen(listener.fd(), SOMAXCONN) != 0) return SocketError(path, std::strerror(errno));
  return listener;
}

StatusOr<DataChannel> DataListener::Accept() {
  while (true) {
    ScopedFd client(::accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (client.valid()) return DataChannel(std::move(client));
    if (errno == EMFILE || errno == ENFILE) {
      return Error(StatusCode::kResourceExhausted, reason::kFileDescriptors,
                   "raise the limit of open files (ulimit -n) of the worker",
                   "client cannot be accepted: {}", std::strerror(errno));
    }
    if (errno == EAGAIN || errno == EWOULDBLOCK) return Status(StatusCode::kDeadlineExceeded, "");
    if (errno != EINTR && errno != ECONNABORTED) return SocketError(path_, std::strerror(errno));
  }
}

Status CheckPeerUser(const DataChannel& channel) {
  WEIGHTD_ASSIGN_OR_RETURN(const ucred peer, channel.PeerCredentials());
  if (peer.uid == 0 || peer.uid == ::geteuid()) return absl::OkStatus();
  return Error(StatusCode::kPermissionDenied, reason::kSocket,
               "run the client as the user of the daemon, or set worker.peer_check = false",
               "client runs as another user: uid={} expected={}", peer.uid, ::geteuid());
}

}  // namespace weightd
