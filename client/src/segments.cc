#include "client/src/segments.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>

namespace weightd {
namespace {

/// Descriptors kept free for the process's own work and for our sockets.
constexpr rlim_t kReserve = 64;

Status TooFew(std::string_view detail) {
  return Error(StatusCode::kResourceExhausted, reason::kFileDescriptors,
               "raise the hard limit of open files (ulimit -Hn, LimitNOFILE= of the unit), or "
               "register fewer separate storages",
               "too few file descriptors: {}", detail);
}

struct DirectoryDeleter {
  void operator()(DIR* directory) const { ::closedir(directory); }
};

/// Descriptors that this process has open.
rlim_t OpenDescriptors() {
  const std::unique_ptr<DIR, DirectoryDeleter> directory(::opendir("/proc/self/fd"));
  rlim_t count = 0;
  while (directory != nullptr && ::readdir(directory.get()) != nullptr) ++count;
  return count;
}

}  // namespace

StatusOr<uint32_t> SegmentSet::Add(int fd) {
  struct stat file;
  if (::fstat(fd, &file) != 0) {
    return Error(StatusCode::kInvalidArgument, reason::kSharedMemory,
                 "keep the shared memory's descriptor open until registration returns",
                 "shared memory descriptor cannot be used: fd={} cause={}", fd,
                 std::strerror(errno));
  }
  const auto next = static_cast<uint32_t>(segments_.size());
  const auto [entry, is_new] = by_file_.try_emplace({file.st_dev, file.st_ino}, next);
  if (!is_new) return entry->second;
  Segment segment;
  segment.fd = ScopedFd(::fcntl(fd, F_DUPFD_CLOEXEC, 3));
  if (!segment.fd.valid()) {
    by_file_.erase(entry);
    return TooFew(fmt::format("lent={} cause={}", next, std::strerror(errno)));
  }
  segment.size_bytes = static_cast<uint64_t>(file.st_size);
  segment.ticket = ForkTicket(segment.fd.get());
  segments_.push_back(std::move(segment));
  return next;
}

Status EnsureDescriptors(size_t count) {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) {
    return absl::OkStatus();
  }
  const rlim_t wanted = OpenDescriptors() + count + kReserve;
  if (wanted <= limit.rlim_cur) return absl::OkStatus();
  if (limit.rlim_max != RLIM_INFINITY && wanted > limit.rlim_max) {
    return TooFew(fmt::format("needed={} hard limit={}", wanted, limit.rlim_max));
  }
  limit.rlim_cur = wanted;
  if (::setrlimit(RLIMIT_NOFILE, &limit) != 0) {
    return TooFew(fmt::format("needed={} cause={}", wanted, std::strerror(errno)));
  }
  return absl::OkStatus();
}

}  // namespace weightd
