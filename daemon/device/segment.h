// Memory that a client lends, whatever it is made of, as the worker of its device sees it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "daemon/base/scoped_fd.h"
#include "daemon/base/status.h"

namespace weightd {

/// A contiguous range of lent memory, mapped here. Unmapped by its destructor.
/// Thread safety: const methods from any thread.
class LentSegment {
 public:
  virtual ~LentSegment() = default;
  /// First byte: an address of this worker's device, for GPU memory not readable by the host.
  virtual std::byte* data() const = 0;
  virtual uint64_t size_bytes() const = 0;
  /// False while pieces of it are still to be offered: then nothing may be bound in it.
  virtual bool complete() const { return true; }
  /// OK while the lender still has what it lent. Without `sizes` only what costs nothing is looked
  /// at. \error UNAVAILABLE MEMORY_MOVED naming the lender
  virtual Status CheckIntact(bool sizes) const = 0;
};

/// A segment, or the next pieces of one, as a client describes it; see weightd.v1.Segment.
struct SegmentOffer {
  enum class Kind : uint8_t { kSharedMemory, kCudaIpc, kCudaVmm };
  Kind kind = Kind::kSharedMemory;
  uint64_t size_bytes = 0;
  std::string device;
  std::string ipc_handle;
  uint64_t allocation = 0;
  std::vector<uint64_t> piece_bytes;
  std::vector<ScopedFd> fds;
  bool writable = false;
  std::string label;  ///< for messages, e.g. "actor 2 segment 7"
};

/// What the lender's own work must reach before its memory is read.
/// Thread safety: any thread.
class LenderFence {
 public:
  virtual ~LenderFence() = default;
  /// True once all work that the lender put before its latest sync is done. Never blocks.
  virtual StatusOr<bool> Passed() const = 0;
};

/// Maps offers for one device. Thread safety: one call at a time.
class SegmentMapper {
 public:
  virtual ~SegmentMapper() = default;
  /// `held` is what the client offered before under the same id, or nullptr; it is returned if the
  /// offer is the same memory, or continues it.
  /// \error INVALID_ARGUMENT PROTOCOL if the offer is malformed
  /// \error INVALID_ARGUMENT DEVICE if the device cannot reach such memory
  /// \error INVALID_ARGUMENT / RESOURCE_EXHAUSTED SHARED_MEMORY or MEMORY if it cannot be mapped
  virtual StatusOr<std::shared_ptr<LentSegment>> Map(SegmentOffer offer,
                                                     std::shared_ptr<LentSegment> held) = 0;
  /// \error INVALID_ARGUMENT PROTOCOL if the handle cannot be opened on this device
  virtual StatusOr<std::shared_ptr<const LenderFence>> OpenFence(const std::string& handle,
                                                                 const std::string& label) = 0;
};

/// Maps shared memory of the host.
class HostSegmentMapper final : public SegmentMapper {
 public:
  StatusOr<std::shared_ptr<LentSegment>> Map(SegmentOffer offer,
                                             std::shared_ptr<LentSegment> held) override;
  StatusOr<std::shared_ptr<const LenderFence>> OpenFence(const std::string& handle,
                                                         const std::string& label) override;
};

}  // namespace weightd
