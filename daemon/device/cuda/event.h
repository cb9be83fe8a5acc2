#pragma once

#include <utility>

#include "daemon/base/status.h"
#include "daemon/device/cuda/handles.h"

namespace weightd::cuda {

/// Owns an event. Move-only. Its destructor waits for nothing.
/// Thread safety: const methods from any thread.
class Event {
 public:
  enum class Kind : unsigned char {
    kOrder,   ///< cheapest: orders streams, answers Done
    kTiming,  ///< also SecondsSince
  };
  static StatusOr<Event> Create(DeviceId device, Kind kind = Kind::kOrder);

  Event() = default;
  Event(Event&& other) noexcept
      : event_(std::exchange(other.event_, nullptr)), device_(other.device_) {}
  Event& operator=(Event&& other) noexcept;
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event();

  EventRef ref() const { return event_; }

  /// Marks the work that `stream` holds so far.
  Status Record(StreamRef stream) const;
  /// True if all that was recorded is done; also if nothing ever was. Never blocks.
  StatusOr<bool> Done() const;
  /// Blocks until then.
  Status Synchronize() const;
  /// Device time between two recorded and finished events of kind kTiming.
  StatusOr<double> SecondsSince(const Event& earlier) const;

 private:
  Event(EventRef event, DeviceId device) : event_(event), device_(device) {}

  EventRef event_ = nullptr;
  DeviceId device_{};
};

}  // namespace weightd::cuda
