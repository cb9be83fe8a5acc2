// The shared memory objects that a client lends, each once.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

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

/// Distinct shared memory objects, numbered in the order in which they came. Objects are told apart
/// by device and inode, so that many descriptors of one object count once.
class SegmentSet {
 public:
  /// Position of the object behind `fd`, which is duplicated when it is new.
  /// \error INVALID_ARGUMENT SHARED_MEMORY if fd is no descriptor
  /// \error RESOURCE_EXHAUSTED FILE_DESCRIPTORS if it cannot be duplicated
  StatusOr<uint32_t> Add(int fd);

  const std::vector<Segment>& segments() const { return segments_; }

 private:
  std::vector<Segment> segments_;
  std::map<std::pair<dev_t, ino_t>, uint32_t> by_file_;
};

/// Raises the soft limit of open files, if need be, so that `count` more fit beside those that are
/// open and a reserve.
/// \error RESOURCE_EXHAUSTED FILE_DESCRIPTORS if the hard limit is lower
Status EnsureDescriptors(size_t count);

}  // namespace weightd
