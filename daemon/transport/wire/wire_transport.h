// Moves what goes over wires: opens them, runs the turns of a transfer, and ends a wire on which
// anything went wrong.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/base/status.h"
#include "daemon/transport/wire/wire.h"

namespace weightd {

/// The wires of one worker, one per plan, which share one staging ring.
/// Thread safety: MakeId and staging_bytes from any thread, all else from one.
class WireTransport {
 public:
  /// How a wire is joined.
  struct Offer {
    uint64_t wire = 0;  ///< the daemon's number
    uint64_t plan = 0;  ///< the daemon's handle of the plan
    std::string id;
    Clock::time_point deadline = Clock::time_point::max();
  };

  WireTransport(std::unique_ptr<WireMaker> maker, std::unique_ptr<WireStage> stage)
      : maker_(std::move(maker)), stage_(std::move(stage)) {}
  ~WireTransport();

  std::string_view name() const { return maker_->name(); }
  StatusOr<std::string> MakeId() { return maker_->MakeId(); }

  /// Joins a wire and exchanges a few bytes over every link of the schedule, so that nothing is
  /// connected for the first time in a transfer. Ends an earlier wire of the plan. Blocks until all
  /// ranks have done the same. \error CANCELLED, DEADLINE_EXCEEDED DEADLINE, UNAVAILABLE WIRE,
  /// RESOURCE_EXHAUSTED GPU_MEMORY
  Status Open(const Offer& offer, const WireSchedule& schedule, const std::atomic<bool>& cancelled);
  /// Ends the wire of a plan, if there is one. \pre no Transfer is running
  void Close(uint64_t plan);
  /// Staging that is held now.
  uint64_t staging_bytes() const { return staging_bytes_.load(std::memory_order_relaxed); }

  /// Digests of what was sent, by engine rank.
  using Digests = std::vector<std::pair<uint32_t, RankDigests>>;
  /// Runs all turns of this device. control.on_window counts turns and landed bytes. After any
  /// error the wire is aborted and closed, nothing touches lent memory any more, and some turns may
  /// have landed. `turn_limit`: longest time without the end of a turn; 0: any. Blocks.
  /// \error CANCELLED CANCELLED, DEADLINE_EXCEEDED DEADLINE naming the peers of the turn,
  /// UNAVAILABLE WIRE; FAILED_PRECONDITION WIRE if this wire is not open
  StatusOr<Digests> Transfer(uint64_t plan_handle, uint64_t wire, const BoundPlan& plan,
                             const WireSchedule& schedule, RunControl& control,
                             milliseconds turn_limit);

  /// True if no later call can succeed: the process must be replaced.
  bool broken() const { return broken_; }

 private:
  struct Opened {
    uint64_t number = 0;
    std::unique_ptr<Wire> wire;
    uint64_t groups = 0;  ///< started on it so far
  };

  Status Note(Status status);
  Status Reserve(uint64_t bytes);
  Status Join(Opened& opened, const Offer& offer, const WireSchedule& schedule,
              const std::atomic<bool>& cancelled);
  StatusOr<Digests> RunTurns(Opened& opened, const BoundPlan& plan, const WireSchedule& schedule,
                             RunControl& control, milliseconds turn_limit);

  const std::unique_ptr<WireMaker> maker_;
  const std::unique_ptr<WireStage> stage_;
  std::map<uint64_t, Opened> wires_;  ///< by plan handle
  std::atomic<uint64_t> staging_bytes_{0};
  bool broken_ = false;
};

}  // namespace weightd
