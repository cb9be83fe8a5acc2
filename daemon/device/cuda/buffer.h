#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "daemon/base/status.h"
#include "daemon/device/cuda/handles.h"

namespace weightd::cuda {

/// Owns device memory of its own allocation (at least 256-byte aligned). Move-only. Freeing waits
/// for the device's work in flight, so buffers are freed at the end of a registration, not of a
/// step.
class DeviceBuffer {
 public:
  /// Contents are undefined. \error RESOURCE_EXHAUSTED GPU_MEMORY with the size
  static StatusOr<DeviceBuffer> Create(DeviceId device, uint64_t size_bytes);

  DeviceBuffer() = default;
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)),
        size_bytes_(std::exchange(other.size_bytes_, 0)),
        device_(other.device_) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer();

  /// nullptr for a default-constructed, moved-from or empty buffer.
  std::byte* data() const { return data_; }
  uint64_t size_bytes() const { return size_bytes_; }
  DeviceId device() const { return device_; }

  /// Copies from / to host memory in stream order; `offset + size` lies inside. Pageable host
  /// memory: `from` may be reused at once, `to` is filled once the stream was waited for.
  Status Upload(const void* from, uint64_t size_bytes, uint64_t offset, StreamRef stream);
  Status Download(void* to, uint64_t size_bytes, uint64_t offset, StreamRef stream) const;
  /// Zeroes all bytes in stream order.
  Status Clear(StreamRef stream);

 private:
  DeviceBuffer(std::byte* data, uint64_t size_bytes, DeviceId device)
      : data_(data), size_bytes_(size_bytes), device_(device) {}

  std::byte* data_ = nullptr;
  uint64_t size_bytes_ = 0;
  DeviceId device_{};
};

/// Owns page-locked host memory, which devices copy to and from without staging. Move-only.
class PinnedBuffer {
 public:
  /// \error RESOURCE_EXHAUSTED GPU_MEMORY with the size
  static StatusOr<PinnedBuffer> Create(DeviceId device, uint64_t size_bytes);

  PinnedBuffer() = default;
  PinnedBuffer(PinnedBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)),
        size_bytes_(std::exchange(other.size_bytes_, 0)) {}
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept;
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;
  ~PinnedBuffer();

  std::byte* data() const { return data_; }
  uint64_t size_bytes() const { return size_bytes_; }

 private:
  PinnedBuffer(std::byte* data, uint64_t size_bytes) : data_(data), size_bytes_(size_bytes) {}

  std::byte* data_ = nullptr;
  uint64_t size_bytes_ = 0;
};

}  // namespace weightd::cuda
