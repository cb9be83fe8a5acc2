// What goes over a wire, when and where it is staged: the copies between devices that share no
// mapped memory, gathered into turns. Pure: every worker computes the same turns from the same plan
// and keeps its own part of them, so that both ends of a message agree without a word.
//
// In a turn every source packs what it has for each destination into one contiguous part of its
// slot, sends each part, and every destination receives its parts into a slot and scatters them.
#pragma once

#include <cstdint>
#include <numeric>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "daemon/plan/transfer_plan.h"

namespace weightd {

/// (source device, target device) whose bytes are packed, sent and scattered.
using WirePairs = std::set<std::pair<std::string, std::string>>;

/// Turns that may be under way at a time, each in a slot of its own: two on the wire, one packed or
/// scattered on either side of them.
inline constexpr uint32_t kWireSlots = 4;
/// Every copy begins at a multiple of this in its slot.
inline constexpr uint64_t kWireAlign = 128;
/// Least staging of a device: a slot must hold a few copies.
inline constexpr uint64_t kMinWireBytes = 64u << 10;

/// The staging of one device: slots to send from and slots to receive into, together at most the
/// bytes that it was made with. A device that only sends, or only receives, has larger ones.
struct WireSlots {
  uint64_t send_bytes = 0;  ///< of one slot; 0: this device sends nothing
  uint64_t receive_bytes = 0;
  bool operator==(const WireSlots&) const = default;
};
WireSlots SlotsOf(const WirePairs& pairs, const std::string& device, uint64_t wire_bytes);

/// What goes to or comes from one peer in one turn.
struct WireOp {
  uint32_t peer = 0;    ///< its rank on the wire
  uint64_t offset = 0;  ///< in the slot
  uint64_t bytes = 0;   ///< on the wire, gaps for alignment included
  bool operator==(const WireOp&) const = default;
};

/// What one device packs and sends, or receives and scatters, turn by turn.
struct WireSide {
  CopyList copies;
  std::vector<uint32_t> targets;   ///< per copy: engine rank
  std::vector<uint64_t> offsets;   ///< per copy: in the slot
  std::vector<uint32_t> copy_end;  ///< per turn
  std::vector<WireOp> ops;         ///< ascending by peer in a turn
  std::vector<uint32_t> op_end;    ///< per turn
  std::vector<uint64_t> bytes;     ///< per turn: landed

  /// Landed, in all turns.
  uint64_t TotalBytes() const { return std::accumulate(bytes.begin(), bytes.end(), uint64_t{0}); }
  uint32_t copy_begin(uint32_t turn) const { return turn == 0 ? 0 : copy_end[turn - 1]; }
  std::span<const WireOp> ops_of(uint32_t turn) const {
    const uint32_t begin = turn == 0 ? 0 : op_end[turn - 1];
    return std::span(ops).subspan(begin, op_end[turn] - begin);
  }
};

/// One device's part of all turns.
struct WireSchedule {
  std::vector<std::string> devices;                  ///< by rank on the wire
  uint32_t rank = 0;                                 ///< of this device
  std::vector<std::pair<uint32_t, uint32_t>> links;  ///< (source, target) by rank
  WireSlots slots;                                   ///< of this device
  uint32_t num_turns = 0;                            ///< of the wire; equal on every device
  WireSide sends;
  WireSide receives;
};

/// The devices of a wire, by rank.
std::vector<std::string> WireDevices(const WirePairs& pairs);

/// What a schedule follows from. `plans` are whole, as EnumerateRank gives them.
struct WireInput {
  std::span<const RankPlan> plans;              ///< per engine rank
  std::span<const RankLayout* const> layouts;   ///< per engine rank
  std::span<const std::string> source_devices;  ///< per actor rank
  std::span<const std::string> target_devices;  ///< per engine rank
  const WirePairs& pairs;
  uint64_t wire_bytes = 0;  ///< staging of one device, at least kMinWireBytes
};

/// The part of `device`; one without turns if no pair names it. A device that is done with a turn
/// may begin the next before the others are. Copies of a destination keep their order; in a turn
/// each destination takes copies until a slot on either side is full.
WireSchedule ScheduleWire(const WireInput& input, const std::string& device);

}  // namespace weightd
