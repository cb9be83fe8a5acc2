// Memory that another process lends: a shared-memory object, mapped and bounds-checked.
//
// The lender can truncate the object at any time, and touching what is gone is a SIGBUS. Three
// things keep that from ending this process: the size is checked when the object is mapped and
// again before every step, objects sealed against shrinking need no more, and for the rest a
// process-wide SIGBUS handler puts private zero pages under the mapping and marks it lost, which
// CheckIntact reports.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "daemon/base/scoped_fd.h"
#include "daemon/base/status.h"
#include "daemon/layout/box.h"

namespace weightd {

/// Owns one mapping of a shared-memory object and its descriptor. Move-only.
/// Thread safety: const methods from any thread.
class Mapping {
 public:
  enum class Access : uint8_t { kRead, kWrite };

  /// Maps the first `size_bytes` of `fd`. `label` names the lender in errors, e.g. "actor 2 segment
  /// 7". Page tables are filled at once if the object's memory is allocated.
  /// \error INVALID_ARGUMENT SHARED_MEMORY if size_bytes is 0, the object is smaller than that, is
  /// not a memory object, or was opened without the access needed
  /// \error RESOURCE_EXHAUSTED SHARED_MEMORY if there is no address space or memory for it
  static StatusOr<Mapping> Create(ScopedFd fd, uint64_t size_bytes, Access access,
                                  std::string label);

  Mapping() = default;
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();

  /// First byte; nullptr for a default-constructed or moved-from mapping.
  std::byte* data() const { return data_; }
  uint64_t size_bytes() const { return size_bytes_; }
  bool writable() const { return access_ == Access::kWrite; }
  const std::string& label() const { return label_; }

  /// OK if every byte is still backed by the lender's object. Before a step: nothing was truncated
  /// until now. After a step: what the step read was the lender's, what it wrote has landed.
  /// Costs two system calls. \error UNAVAILABLE MEMORY_MOVED naming the lender
  Status CheckIntact() const;
  /// The part of CheckIntact that costs nothing: finds a truncation only once it was touched.
  Status CheckTouched() const;

 private:
  void Unmap();
  Status Truncated(uint64_t now_bytes) const;

  std::byte* data_ = nullptr;
  uint64_t size_bytes_ = 0;
  Access access_ = Access::kRead;
  ScopedFd fd_;
  std::string label_;
  void* guard_ = nullptr;  // this mapping's entry in the SIGBUS handler's list
};

/// OK if a block of `extent` with `strides` (elements) and elements of `element_bytes` that starts
/// `offset_bytes` into a segment of `segment_bytes` lies inside it. With `exclusive` no two
/// elements may share memory. An empty block is inside. Never overflows.
/// \error INVALID_ARGUMENT SHAPE with the numbers
Status CheckBlockInside(uint64_t segment_bytes, uint64_t offset_bytes, const Dims& extent,
                        const Dims& strides, uint64_t element_bytes, bool exclusive);

}  // namespace weightd
