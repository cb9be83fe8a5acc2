#include "client/checkpoint/mapped_file.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace weightd {

StatusOr<MappedFile> MappedFile::Map(ScopedFd fd, std::string name) {
  MappedFile file;
  file.fd_ = std::move(fd);
  file.name_ = std::move(name);
  void* data = MAP_FAILED;
  if (::fstat(file.fd_.get(), &file.mapped_) == 0) {
    file.size_ = static_cast<size_t>(file.mapped_.st_size);
    if (file.size_ == 0) return file;
    data = ::mmap(nullptr, file.size_, PROT_READ, MAP_SHARED, file.fd_.get(), 0);
  }
  if (data == MAP_FAILED) {
    return Error(StatusCode::kResourceExhausted, reason::kCheckpoint,
                 "free address space (ulimit -v), or put the files on a file system that maps",
                 "cannot map {}: {}", file.name_, std::strerror(errno));
  }
  file.data_ = static_cast<const char*>(data);
  return file;
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : fd_(std::move(other.fd_)),
      name_(std::move(other.name_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      mapped_(other.mapped_) {}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<char*>(data_), size_);
}

void MappedFile::ReleasePages() const {
  if (data_ != nullptr) ::madvise(const_cast<char*>(data_), size_, MADV_DONTNEED);
}

bool MappedFile::Unchanged() const {
  struct stat now {};
  const auto same = [](const timespec& a, const timespec& b) {
    return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec;
  };
  return ::fstat(fd_.get(), &now) == 0 && now.st_size == mapped_.st_size &&
         same(now.st_mtim, mapped_.st_mtim);
}

}  // namespace weightd
