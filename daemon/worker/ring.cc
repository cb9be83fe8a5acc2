#include "daemon/worker/ring.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace weightd {

StatusOr<std::shared_ptr<Ring>> Ring::Create() {
  std::shared_ptr<Ring> ring(new Ring);  // shared by the member and a running step
  ring->fd_ = ScopedFd(::memfd_create("weightd-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!ring->fd_.valid()) {
    return Error(StatusCode::kResourceExhausted, reason::kFileDescriptors,
                 "raise the limit of open files (ulimit -n) of the worker",
                 "ring cannot be created: {}", std::strerror(errno));
  }
  void* base = MAP_FAILED;
  // Sealed against a change of size, so that a client cannot make a read here fault.
  if (::ftruncate(ring->fd(), kRingBytes) == 0 &&
      ::fcntl(ring->fd(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0) {
    base = ::mmap(nullptr, kRingBytes, PROT_READ, MAP_SHARED, ring->fd(), 0);
  }
  if (base == MAP_FAILED) {
    return Error(StatusCode::kResourceExhausted, reason::kSharedMemory,
                 "free memory or raise the memory limit of the worker",
                 "ring cannot be mapped: bytes={} error={}", kRingBytes, std::strerror(errno));
  }
  ring->base_ = static_cast<std::byte*>(base);
  return ring;
}

Ring::~Ring() {
  if (base_ != nullptr) ::munmap(base_, kRingBytes);
}

void Ring::Drop() const {
  ::fallocate(fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, kRingBytes);
}

void StagingBudget::Use(const std::shared_ptr<Ring>& ring) {
  const std::lock_guard lock(mutex_);
  recent_.remove_if([&ring](const std::weak_ptr<Ring>& entry) {
    const std::shared_ptr<Ring> other = entry.lock();
    return other == nullptr || other == ring;
  });
  recent_.push_front(ring);
  while (recent_.size() * kRingBytes > kStagingBytes) {
    if (const std::shared_ptr<Ring> oldest = recent_.back().lock()) oldest->Drop();
    recent_.pop_back();
  }
}

uint64_t StagingBudget::resident_bytes() const {
  const std::lock_guard lock(mutex_);
  return recent_.size() * kRingBytes;
}

}  // namespace weightd
