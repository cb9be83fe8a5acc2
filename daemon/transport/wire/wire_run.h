#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/transport/wire/wire.h"

namespace weightd {

/// Per turn and engine rank that receives: the writes of which nothing is left to be received once
/// the turn is over.
std::vector<std::map<uint32_t, uint32_t>> WritesReceived(const WireSchedule& schedule);

/// All turns of one transfer on one device: pack, send and receive, scatter, each of them in order
/// and beside the others, as far as slots are free. Thread safety: none.
class WireRun {
 public:
  /// \pre stage.Begin(…, schedule, …) was called; everything outlives this
  WireRun(Wire& wire, WireStage& stage, const WireSchedule& schedule, uint64_t groups_before)
      : wire_(wire), stage_(stage), schedule_(schedule), groups_(groups_before) {}

  /// Does what can be done now; never waits. True if anything was done.
  StatusOr<bool> Advance();
  bool finished() const { return scattered_ == schedule_.num_turns; }
  /// Turns that are over on this device.
  uint32_t turns_done() const { return scattered_; }
  /// Groups that were started on the wire, those before this run included.
  uint64_t groups() const { return groups_; }

 private:
  StatusOr<bool> StartGroup();

  Wire& wire_;
  WireStage& stage_;
  const WireSchedule& schedule_;
  uint64_t groups_;
  // Turns, each at most as far as the one before.
  uint32_t packing_ = 0;
  uint32_t started_ = 0;
  uint32_t ended_ = 0;
  uint32_t scattered_ = 0;
  std::array<uint64_t, kWireSlots> needs_{};  ///< of the turns started: groups that must have ended
};

}  // namespace weightd
