// A file that is read where it lies.
#pragma once

#include <sys/stat.h>

#include <string>
#include <string_view>

#include "daemon/base/scoped_fd.h"
#include "daemon/base/status.h"

namespace weightd {

/// A whole file, mapped read-only: reading it takes no memory that the kernel cannot take back.
/// A file that is truncated while it is read kills the reader with SIGBUS. Move-only.
class MappedFile {
 public:
  /// `name` is for errors. \pre fd is a regular file
  /// \error RESOURCE_EXHAUSTED CHECKPOINT if it cannot be mapped
  static StatusOr<MappedFile> Map(ScopedFd fd, std::string name);

  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&&) = delete;
  ~MappedFile();

  const std::string& name() const { return name_; }
  std::string_view bytes() const { return {data_, size_}; }

  /// Gives back the memory that reading has made resident; the next read fetches it again.
  void ReleasePages() const;
  /// False if the file has been written to, truncated or touched since Map.
  bool Unchanged() const;

 private:
  MappedFile() = default;

  ScopedFd fd_;
  std::string name_;
  const char* data_ = nullptr;
  size_t size_ = 0;
  struct stat mapped_ {};
};

}  // namespace weightd
