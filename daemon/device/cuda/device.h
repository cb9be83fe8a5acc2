#pragma once

#include <cstdint>
#include <string>

#include "daemon/base/status.h"
#include "daemon/device/cuda/handles.h"

namespace weightd::cuda {

/// OK if this process can use at least one GPU. Never starts a context.
/// \error UNAVAILABLE DEVICE with CUDA's reason: no driver, a driver too old, no device
Status CheckAvailable();

/// Multiprocessors of a device. \error UNAVAILABLE DEVICE
StatusOr<int> NumMultiprocessors(DeviceId device);

/// The product's name, e.g. "NVIDIA H200". \error UNAVAILABLE DEVICE
StatusOr<std::string> DeviceName(DeviceId device);

/// Memory that nobody has allocated. Starts this process's context. \error UNAVAILABLE DEVICE
StatusOr<uint64_t> FreeBytes(DeviceId device);

/// Makes a device current for this thread while it lives, then the one that was. Never throws; if
/// the device cannot be made current, the calls that follow fail and say so.
class DeviceGuard {
 public:
  explicit DeviceGuard(DeviceId device);
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard();

 private:
  int previous_ = -1;
};

}  // namespace weightd::cuda
