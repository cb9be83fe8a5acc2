// A directory out of which no name and no link leads.
#pragma once

#include <string>

#include "daemon/base/scoped_fd.h"
#include "daemon/base/status.h"

namespace weightd {

/// Opens files of one checkpoint directory. The kernel resolves every name (openat2), so that
/// neither `..` nor an absolute name nor a symbolic link leaves the directory. One exception, since
/// it is how Hugging Face's cache looks: in `REPO/snapshots/REVISION`, when `REPO/blobs` exists,
/// links may lead to anything inside REPO; names still may not.
class CheckpointFolder {
 public:
  /// \error NOT_FOUND CHECKPOINT if `path` is no directory that can be read
  static StatusOr<CheckpointFolder> Open(const std::string& path);

  /// Opens a regular file for reading.
  /// \error NOT_FOUND CHECKPOINT if there is none of this name
  /// \error INVALID_ARGUMENT CHECKPOINT if name or link leave the directory, or it is no regular
  /// file
  /// \error FAILED_PRECONDITION CHECKPOINT if it is a link to a file that does not exist, or the
  /// kernel has no openat2
  StatusOr<ScopedFd> OpenFile(const std::string& name) const;

  const std::string& path() const { return path_; }

 private:
  std::string path_;
  ScopedFd directory_;
  ScopedFd link_root_;       // links may lead anywhere below it
  std::string link_prefix_;  // the directory below link_root_, with a slash at its end; or empty
};

}  // namespace weightd
