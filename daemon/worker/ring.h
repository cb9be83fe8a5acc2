// Staging for memory that cannot be lent: a small shared memory object per client, into which the
// client copies one part of a shard at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>

#include "daemon/base/scoped_fd.h"
#include "daemon/base/status.h"

namespace weightd {

/// Bytes of one ring, and so the largest part of a shard that is fetched at once.
inline constexpr uint64_t kRingBytes = 8u << 20;
/// Parts that fit a ring. One: the transport asks for the next part when it is done with the last.
inline constexpr uint32_t kRingSlots = 1;
/// Most bytes of all rings of a worker that hold pages at a time, whatever the number of clients.
inline constexpr uint64_t kStagingBytes = 64u << 20;

/// One client's ring, mapped here. Thread safety: immutable but for its pages.
class Ring {
 public:
  /// \error RESOURCE_EXHAUSTED SHARED_MEMORY / FILE_DESCRIPTORS
  static StatusOr<std::shared_ptr<Ring>> Create();
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;
  ~Ring();

  int fd() const { return fd_.get(); }
  const std::byte* base() const { return base_; }
  /// Gives the pages back to the system; the content is then zero.
  void Drop() const;

 private:
  Ring() = default;
  ScopedFd fd_;
  std::byte* base_ = nullptr;
};

/// Keeps the pages of all rings of a worker below kStagingBytes by dropping those of the ring that
/// was used longest ago. Thread safety: any thread.
class StagingBudget {
 public:
  /// Call before a client is asked to fill `ring`. Afterwards the content of other rings may be
  /// gone.
  void Use(const std::shared_ptr<Ring>& ring);
  /// Bytes that may hold pages now.
  uint64_t resident_bytes() const;

 private:
  mutable std::mutex mutex_;
  std::list<std::weak_ptr<Ring>> recent_;  ///< latest use first
};

}  // namespace weightd
