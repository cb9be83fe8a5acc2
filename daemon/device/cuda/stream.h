#pragma once

#include <utility>

#include "daemon/base/status.h"
#include "daemon/device/cuda/handles.h"

namespace weightd::cuda {

/// Owns a non-blocking stream (one that does not wait for the default stream). Move-only.
/// The destructor does not wait: work in flight still runs, so buffers it uses must outlive it.
/// Thread safety: const methods from any thread.
class Stream {
 public:
  /// `high_priority`: its blocks are scheduled before those of other streams of this process.
  static StatusOr<Stream> Create(DeviceId device, bool high_priority = false);

  Stream() = default;
  Stream(Stream&& other) noexcept
      : stream_(std::exchange(other.stream_, nullptr)), device_(other.device_) {}
  Stream& operator=(Stream&& other) noexcept;
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream();

  /// nullptr for a default-constructed or moved-from stream.
  StreamRef ref() const { return stream_; }
  DeviceId device() const { return device_; }

  /// Later work on this stream waits for what `event` recorded. Returns at once.
  Status Wait(EventRef event) const;
  /// Blocks until all work of this stream is done; other streams are left alone. An error of an
  /// earlier kernel shows here.
  Status Synchronize() const;

 private:
  Stream(StreamRef stream, DeviceId device) : stream_(stream), device_(device) {}

  StreamRef stream_ = nullptr;
  DeviceId device_{};
};

}  // namespace weightd::cuda
