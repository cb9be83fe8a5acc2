// GPU memory of other processes, mapped for the worker of one GPU.
//
// Every handle is opened with the worker's own device current: one that is opened on the owner's
// device gives illegal addresses in kernels of another, even with peer access enabled.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "daemon/base/status.h"
#include "daemon/device/cuda/driver.h"
#include "daemon/device/segment.h"

namespace weightd::cuda {

/// Keeps the worker's context: the primary one of its GPU, which the CUDA runtime uses as well.
/// Shared by everything that is mapped in it. Thread safety: immutable.
class WorkerContext {
 public:
  /// Creates the context if it does not exist.
  /// \error FAILED_PRECONDITION DEVICE without a driver, NOT_FOUND DEVICE for an unknown UUID
  static StatusOr<std::shared_ptr<const WorkerContext>> Create(const std::string& uuid);
  WorkerContext(const WorkerContext&) = delete;
  WorkerContext& operator=(const WorkerContext&) = delete;
  ~WorkerContext();

  const Driver& driver() const { return *driver_; }
  DeviceOrdinal ordinal() const { return ordinal_; }
  const std::string& uuid() const { return uuid_; }

  /// OK if kernels of this GPU can reach memory of `uuid`.
  /// \error INVALID_ARGUMENT DEVICE if that GPU is unknown or there is no peer access
  Status CheckReach(const std::string& uuid) const;

 private:
  WorkerContext(const Driver* driver, DeviceOrdinal ordinal, std::string uuid)
      : driver_(driver), ordinal_(ordinal), uuid_(std::move(uuid)) {}
  const Driver* driver_;
  const DeviceOrdinal ordinal_;
  const std::string uuid_;
};

/// Maps each allocation once, whoever offers it, and unmaps it with its last user.
class CudaSegmentMapper final : public SegmentMapper {
 public:
  explicit CudaSegmentMapper(std::shared_ptr<const WorkerContext> context)
      : context_(std::move(context)) {}

  StatusOr<std::shared_ptr<LentSegment>> Map(SegmentOffer offer,
                                             std::shared_ptr<LentSegment> held) override;
  StatusOr<std::shared_ptr<const LenderFence>> OpenFence(const std::string& handle,
                                                         const std::string& label) override;

 private:
  StatusOr<std::shared_ptr<LentSegment>> MapAllocation(const SegmentOffer& offer);

  const std::shared_ptr<const WorkerContext> context_;  ///< shared with the mapped segments
  std::map<std::string, std::weak_ptr<LentSegment>> allocations_;  ///< by identity
};

}  // namespace weightd::cuda
