#include "client/checkpoint/folder.h"

#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>

namespace weightd {
namespace {

namespace fs = std::filesystem;

constexpr int kMostTries = 100;

// openat2 below `root`; -1 with errno. EAGAIN means that something was renamed meanwhile.
int OpenBeneath(int root, const std::string& name, uint64_t flags) {
  open_how how{};
  how.flags = flags | O_CLOEXEC;
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS;
  long fd = -1;
  for (int i = 0; i < kMostTries; ++i) {
    fd = ::syscall(SYS_openat2, root, name.c_str(), &how, sizeof(how));
    if (fd >= 0 || (errno != EAGAIN && errno != EINTR)) break;
  }
  return static_cast<int>(fd);
}

template <typename... Args>
Status Refuse(StatusCode code, std::string_view remedy, fmt::format_string<Args...> format,
              Args&&... args) {
  return Error(code, reason::kCheckpoint, remedy, format, std::forward<Args>(args)...);
}

// Why `name` of `folder` could not be opened; errno says it.
Status Cannot(int error, const std::string& folder, const std::string& name, bool is_link) {
  switch (error) {
    case ENOENT:
    case ENOTDIR:
      if (is_link) {
        return Refuse(StatusCode::kFailedPrecondition, "finish the download, or download it again",
                      "{} in {} is a link to a file that does not exist", name, folder);
      }
      return Refuse(StatusCode::kNotFound,
                    "push a directory as save_pretrained writes it; if it was downloaded, finish "
                    "the download",
                    "no file {} in {}", name, folder);
    case EXDEV:
      return Refuse(StatusCode::kInvalidArgument,
                    is_link ? "replace the link by the file, or push the directory that it leads to"
                            : "correct the name: all files lie in the checkpoint's directory",
                    "{} leads out of the checkpoint's directory: {}", name, folder);
    case ENOSYS:
    case EPERM:
      return Refuse(StatusCode::kFailedPrecondition,
                    "use Linux 5.6 or newer; in a container, allow the system call openat2",
                    "cannot open files safely here, openat2 is missing: {} in {}", name, folder);
    default:
      return Refuse(StatusCode::kInvalidArgument, "make the file readable for this user",
                    "cannot open {} in {}: {}", name, folder, std::strerror(error));
  }
}

}  // namespace

StatusOr<CheckpointFolder> CheckpointFolder::Open(const std::string& path) {
  CheckpointFolder folder;
  folder.path_ = path;
  folder.directory_ = ScopedFd(::open(path.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
  if (!folder.directory_.valid()) {
    return Refuse(StatusCode::kNotFound, "name the directory of a Hugging Face checkpoint",
                  "cannot read the checkpoint's directory: {}: {}", path, std::strerror(errno));
  }
  std::error_code error;
  const fs::path real = fs::canonical(path, error);
  if (error || real.parent_path().filename() != "snapshots") return folder;
  const int flags = O_PATH | O_DIRECTORY | O_CLOEXEC;
  const ScopedFd blobs(::openat(folder.directory_.get(), "../../blobs", flags));
  ScopedFd repository(::openat(folder.directory_.get(), "../..", flags));
  if (!blobs.valid() || !repository.valid()) return folder;
  folder.link_root_ = std::move(repository);
  folder.link_prefix_ = fmt::format("snapshots/{}/", real.filename().string());
  return folder;
}

StatusOr<ScopedFd> CheckpointFolder::OpenFile(const std::string& name) const {
  if (name.empty() || name.find('\0') != std::string::npos) {
    return Refuse(StatusCode::kInvalidArgument, "correct the name", "not a file name in {}: '{}'",
                  path_, name);
  }
  // The name itself, its last link not followed.
  const ScopedFd entry(OpenBeneath(directory_.get(), name, O_PATH | O_NOFOLLOW));
  if (!entry.valid()) return Cannot(errno, path_, name, false);
  struct stat found {};
  const bool is_link = ::fstat(entry.get(), &found) == 0 && S_ISLNK(found.st_mode);
  const int root = link_root_.valid() ? link_root_.get() : directory_.get();
  // O_NONBLOCK: opening a pipe must not wait for a writer.
  ScopedFd file(OpenBeneath(root, link_prefix_ + name, O_RDONLY | O_NONBLOCK | O_NOCTTY));
  if (!file.valid()) return Cannot(errno, path_, name, is_link);
  if (::fstat(file.get(), &found) != 0 || !S_ISREG(found.st_mode)) {
    return Refuse(StatusCode::kInvalidArgument, "put a regular file there",
                  "{} in {} is not a regular file", name, path_);
  }
  return file;
}

}  // namespace weightd
