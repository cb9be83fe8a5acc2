// Runs the steps of a sync: binds a plan to the memory that its members lend now and drives the
// transport.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/base/status.h"
#include "daemon/transport/transport.h"
#include "daemon/transport/wire/wire_transport.h"
#include "daemon/worker/catch_up.h"
#include "daemon/worker/member_table.h"
#include "daemon/worker/plan_binding.h"
#include "daemon/worker/plan_store.h"

namespace weightd {

/// Progress is reported at most this often.
inline constexpr milliseconds kProgressInterval{50};

/// How many writes of an engine rank have landed, by its position in the plan; see
/// RunControl::landed.
using LandedByTarget = std::map<uint32_t, std::atomic<uint32_t>>;

/// Thread safety: one verification at a time, and one other step beside it.
class StepRunner {
 public:
  /// How bytes are moved and read.
  struct Movers {
    Transport* transport = nullptr;
    Transport* verifier = nullptr;   ///< of verifications alone
    WireTransport* wires = nullptr;  ///< may be nullptr
  };

  /// The pointers outlive this. `num_threads`: of catch-up, see CatchUp.
  StepRunner(MemberTable* members, PlanStore* plans, const Movers& movers, int num_threads,
             ReportFn report);

  /// Runs one step to its end. `cancelled` may be set by any thread, and is set when a member that
  /// the step uses is lost: the step then ends at its next window and says who was lost. When this
  /// returns, nothing is written any more. `landed`: what a verification of these targets may read,
  /// raised by another thread; nullptr: everything. Blocks.
  v1::StepDone Run(const v1::RunStep& command, std::atomic<bool>* cancelled,
                   const LandedByTarget* landed = nullptr);

  void DropRetained(uint64_t version) { catch_up_.DropRetained(version); }

 private:
  struct Context;
  Status Dispatch(Context* context, v1::StepDone* done);
  Status CheckTargets(const Context& context) const;
  Status AwaitSources(const Context& context) const;
  Status Transfer(Context* context, v1::StepDone* done);
  Status TransferOverWire(Context* context, const BoundPlan& bound, v1::StepDone* done);
  Status Verify(Context* context, v1::StepDone* done);
  Status CheckReplicas(Context* context, v1::StepDone* done);
  Status CompareReplica(Context* context, const BoundPlan& bound,
                        const SourceGrid::ReplicatedShard& replica, RunControl* control,
                        v1::StepDone* done);
  Status CatchUpTargets(Context* context, v1::StepDone* done);
  Status CatchUpOne(Context* context, uint32_t target, uint64_t peer, const BoundPlan& bound,
                    const CatchUp::Control& control);
  RunControl ControlOf(Context* context, StagedSource* staged);
  void TellLanded(Context* context, uint32_t target, uint32_t writes);
  void Progress(Context* context, uint64_t bytes, uint32_t windows, const std::string& layer);

  MemberTable* const members_;
  PlanStore* const plans_;
  Transport* const transport_;
  Transport* const verifier_;
  WireTransport* const wires_;
  const ReportFn report_;
  CatchUp catch_up_;
};

}  // namespace weightd
