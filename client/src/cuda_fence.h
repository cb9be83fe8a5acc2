// Tells the worker when the trainer's GPU has produced the weights: an event that other processes
// can wait for. Nobody synchronises a device.
#pragma once

#include <string>

#include "daemon/base/status.h"
#include "daemon/device/cuda/driver.h"

namespace weightd {

/// An interprocess event on one GPU of this process. Move-only. Thread safety: none.
class CudaFence {
 public:
  CudaFence() = default;
  /// Makes the event in the GPU's primary context, which must exist. \error INTERNAL DEVICE
  static StatusOr<CudaFence> Create(cuda::DeviceOrdinal device);
  CudaFence(CudaFence&& other) noexcept;
  CudaFence& operator=(CudaFence&& other) noexcept;
  ~CudaFence();

  bool valid() const { return event_ != nullptr; }
  cuda::DeviceOrdinal device() const { return device_; }
  /// 64 bytes that another process can open; empty if there is no event.
  std::string handle() const;
  /// From now on the event stands for the work of `stream` so far. Does not wait for it.
  /// \error INTERNAL DEVICE \pre valid()
  Status Record(CUstream_st* stream);

 private:
  const cuda::Driver* driver_ = nullptr;
  cuda::DeviceOrdinal device_ = 0;
  CUevent_st* event_ = nullptr;
  cuda::IpcHandle handle_;
};

}  // namespace weightd
