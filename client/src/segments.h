// The memory that a client lends, each object once: shared memory of the host, or GPU allocations.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "client/src/cuda_segments.h"
#include "client/src/fork_guard.h"
#include "daemon/base/scoped_fd.h"
#include "daemon/base/status.h"

namespace weightd {

/// A shared memory object, duplicated from the caller's descriptor.
struct Segment {
  ScopedFd fd;
  uint64_t size_bytes = 0;
  ForkTicket ticket;
};

/// Distinct shared memory objects, numbered in the order in which they came, and the GPU segments
/// after them. Objects are told apart by device and inode, so that many descriptors of one object
/// count once.
class SegmentSet {
 public:
  /// Position of the object behind `fd`, which is duplicated when it is new.
  /// \error INVALID_ARGUMENT SHARED_MEMORY if fd is no descriptor
  /// \error RESOURCE_EXHAUSTED FILE_DESCRIPTORS if it cannot be duplicated
  StatusOr<uint32_t> Add(int fd);

  const std::vector<Segment>& segments() const { return segments_; }
  CudaSegmentSet& cuda() { return cuda_; }
  const CudaSegmentSet& cuda() const { return cuda_; }
  /// Number of the first GPU segment.
  uint32_t first_cuda() const { return static_cast<uint32_t>(segments_.size()); }

 private:
  std::vector<Segment> segments_;
  std::map<std::pair<dev_t, ino_t>, uint32_t> by_file_;
  CudaSegmentSet cuda_;
};

/// Raises the soft limit of open files, if need be, so that `count` more fit beside those that are
/// open and a reserve.
/// \error RESOURCE_EXHAUSTED FILE_DESCRIPTORS if the hard limit is lower
Status EnsureDescriptors(size_t count);

}  // namespace weightd
