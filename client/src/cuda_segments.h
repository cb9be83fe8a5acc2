// GPU memory that a client lends: the allocations behind its tensors, each once, with the handles
// by which the worker of another process can map them.
//
// Two kinds can be lent. An ordinary allocation (cudaMalloc; torch's default) has a legacy IPC
// handle, which maps the whole of it. Memory mapped piece by piece (torch's expandable segments)
// has one descriptor per piece; pieces that follow each other in address form one segment, so that
// a tensor may span them. Nothing here creates a CUDA context.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "client/src/fork_guard.h"
#include "daemon/base/scoped_fd.h"
#include "daemon/base/status.h"
#include "daemon/device/cuda/driver.h"

namespace weightd {

/// One piece of a segment that has no legacy handle.
struct CudaPiece {
  ScopedFd fd;
  ForkTicket ticket;
  uint64_t size_bytes = 0;
};

/// A contiguous range of GPU memory of this process.
struct CudaSegment {
  cuda::DevicePtr base = 0;
  uint64_t size_bytes = 0;
  std::string device;             ///< UUID of its GPU
  cuda::IpcHandle handle;         ///< when there are no pieces
  uint64_t allocation = 0;        ///< the driver's id of the allocation; 0 when there are pieces
  std::vector<CudaPiece> pieces;  ///< by address; empty for an ordinary allocation
};

/// Thread safety: none until Seal, immutable afterwards.
class CudaSegmentSet {
 public:
  /// Finds the allocations behind [address, address + size_bytes) and their handles.
  /// \error FAILED_PRECONDITION DEVICE if the process has not loaded the CUDA driver
  /// \error INVALID_ARGUMENT MEMORY_MOVED if the range is no GPU memory, or is partly freed
  /// \error UNIMPLEMENTED MEMORY if it cannot be mapped elsewhere; names why and the remedy
  /// \error INVALID_ARGUMENT DEVICE if it lies on another GPU than what was added before
  /// \error RESOURCE_EXHAUSTED FILE_DESCRIPTORS
  Status Add(const void* address, uint64_t size_bytes);

  /// Joins the pieces and numbers the segments. Call once, after the last Add.
  void Seal();

  /// Where an added address lies: position of the segment and offset in it. \pre sealed
  struct Place {
    uint32_t segment = 0;
    uint64_t offset_bytes = 0;
  };
  Place Find(const void* address) const;

  const std::vector<CudaSegment>& segments() const { return segments_; }
  bool empty() const { return segments_.empty() && allocations_.empty(); }
  /// UUID of the GPU; empty while nothing was added.
  const std::string& device() const { return device_; }
  /// The device whose worker the memory is lent to: device(), empty likewise. In builds with
  /// failpoints WEIGHTD_TEST_GPU_WORKER=N names another worker of the same GPU, "GPU-<uuid>.N".
  std::string worker_device() const;
  cuda::DeviceOrdinal ordinal() const { return ordinal_; }

  /// OK while every ordinary allocation still is the one that was added. About a microsecond each.
  /// \error FAILED_PRECONDITION MEMORY_MOVED
  Status CheckAlive() const;

 private:
  StatusOr<CudaSegment> Describe(cuda::DevicePtr address);
  Status DescribeDevice(cuda::DevicePtr address, CudaSegment* segment);
  Status DescribeAllocation(cuda::DevicePtr address, CudaSegment* segment) const;
  Status DescribePiece(cuda::DevicePtr address, CudaSegment* segment);

  const cuda::Driver* driver_ = nullptr;
  std::string device_;
  cuda::DeviceOrdinal ordinal_ = 0;
  size_t num_pieces_ = 0;
  std::map<cuda::DevicePtr, CudaSegment> allocations_;  ///< by base, until Seal
  std::vector<CudaSegment> segments_;                   ///< by base
};

}  // namespace weightd
