// A communicator between workers, and the staging beside it: what NCCL is between GPUs and unix
// sockets are between workers of host memory. Both behave as NCCL does, so that the same state
// machine serves both and is tested without a GPU: nobody is told that a peer is dead, and a wire
// that was aborted is of no more use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/base/status.h"
#include "daemon/plan/wire_schedule.h"
#include "daemon/transport/transport.h"

namespace weightd {

/// Groups that may be on the wire side by side: turn n goes over lane n % kWireLanes, so that one
/// group fills the link while another begins or ends.
inline constexpr uint32_t kWireLanes = 2;

/// One message of a group.
struct WireMessage {
  uint32_t peer = 0;  ///< rank
  bool send = false;  ///< else it is received
  std::byte* data = nullptr;
  uint64_t bytes = 0;
};

/// One rank of a wire. The groups of a lane run in the order in which they were started, beside
/// those of other lanes; the messages of one group run side by side. What one rank sends on a lane
/// its peer receives on the same. Nothing here blocks for longer than a look.
/// Thread safety: one thread, the issuing thread of its device. The destructor aborts.
class Wire {
 public:
  virtual ~Wire() = default;

  /// True once all ranks have joined. \error UNAVAILABLE WIRE, RESOURCE_EXHAUSTED GPU_MEMORY
  virtual StatusOr<bool> Opened() = 0;
  /// True if a group may be started on `lane` now. \pre opened \error UNAVAILABLE WIRE
  virtual StatusOr<bool> Ready(uint32_t lane) = 0;
  /// Starts a group on `lane`. Sent bytes must stay, and received ones are undefined, until it has
  /// ended. \pre Ready(lane), at least one message, at most kWireSlots groups that have not ended
  /// \error UNAVAILABLE WIRE
  virtual Status Start(uint32_t lane, std::span<const WireMessage> group) = 0;
  /// How many groups, in the order of their starts, have ended with all before them.
  /// \error UNAVAILABLE WIRE or DEVICE
  virtual StatusOr<uint64_t> Ended() = 0;
  /// Ends all groups, whatever became of the peers; afterwards nothing of theirs runs on and no
  /// memory is touched any more. Blocks for some ten milliseconds. \post only destruction is
  /// allowed
  virtual void Abort() = 0;
  /// Blocks until there may be news, at most `limit`.
  virtual void AwaitNews(microseconds limit) = 0;
};

/// Makes the wires of one device. Thread safety: MakeId from any thread, Open as Wire.
class WireMaker {
 public:
  virtual ~WireMaker() = default;
  /// "nccl" or "socket".
  virtual std::string_view name() const = 0;
  /// An identity for one new wire, opaque; its maker must take part in the wire.
  /// \error UNAVAILABLE WIRE
  virtual StatusOr<std::string> MakeId() = 0;
  /// Begins to join as rank `rank` of `size`. \error INVALID_ARGUMENT PROTOCOL for an id that no
  /// maker made, UNAVAILABLE WIRE
  virtual StatusOr<std::unique_ptr<Wire>> Open(const std::string& id, uint32_t rank,
                                               uint32_t size) = 0;
};

/// The staging ring of one device and what fills and empties it. Packing and scattering run in the
/// order of turns, beside the wire.
/// Thread safety: one thread, that of the wires.
class WireStage {
 public:
  virtual ~WireStage() = default;

  /// Makes the ring at least this large; 0 frees it. \pre nothing runs
  /// \error RESOURCE_EXHAUSTED GPU_MEMORY or SHARED_MEMORY with the numbers
  virtual Status Reserve(uint64_t bytes) = 0;
  virtual std::byte* ring() = 0;
  virtual uint64_t ring_bytes() const = 0;

  /// Binds what the turns of `schedule` read and write. \pre everything outlives Finish or Drain
  /// \error FAILED_PRECONDITION MEMORY_MOVED, INVALID_ARGUMENT SHAPE / DTYPE, GPU_MEMORY
  virtual Status Begin(const BoundPlan& plan, const WireSchedule& schedule,
                       RunControl& control) = 0;
  /// Packs the copies of a turn into its slot, casting, and adds up their digests.
  virtual Status Pack(uint32_t turn) = 0;
  /// Turns whose parts lie in their slots.
  virtual StatusOr<uint32_t> Packed() = 0;
  virtual Status Scatter(uint32_t turn) = 0;
  /// Turns that have landed.
  virtual StatusOr<uint32_t> Scattered() = 0;
  /// The digests of what was packed. \pre all turns were packed
  virtual StatusOr<std::vector<uint64_t>> Words() = 0;
  /// Blocks until nothing of Pack and Scatter runs any more.
  virtual Status Drain() = 0;
};

/// Where a turn's parts lie in a ring: sending slots first.
inline uint64_t SendSlot(const WireSchedule& schedule, uint32_t turn) {
  return turn % kWireSlots * schedule.slots.send_bytes;
}
inline uint64_t ReceiveSlot(const WireSchedule& schedule, uint32_t turn) {
  return kWireSlots * schedule.slots.send_bytes + turn % kWireSlots * schedule.slots.receive_bytes;
}
inline uint64_t RingBytes(const WireSlots& slots) {
  return kWireSlots * (slots.send_bytes + slots.receive_bytes);
}

}  // namespace weightd
