// Runs the steps of a sync: binds a plan to the memory that its members lend now and drives the
// transport.
#pragma once

#include <atomic>
#include <cstdint>
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

/// Thread safety: one call at a time.
class StepRunner {
 public:
  /// The pointers outlive this; `wires` may be nullptr. `num_threads`: of catch-up, see CatchUp.
  StepRunner(MemberTable* members, PlanStore* plans, Transport* transport, WireTransport* wires,
             int num_threads, ReportFn report);

  /// Runs one step to its end. `cancelled` may be set by any thread, and is set when a member that
  /// the step uses is lost: the step then ends at its next window and says who was lost. When this
  /// returns, nothing is written any more. Blocks.
  v1::StepDone Run(const v1::RunStep& command, std::atomic<bool>* cancelled);

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
  void Progress(Context* context, uint64_t bytes, uint32_t windows, const std::string& layer);

  MemberTable* const members_;
  PlanStore* const plans_;
  Transport* const transport_;
  WireTransport* const wires_;
  const ReportFn report_;
  CatchUp catch_up_;
};

}  // namespace weightd
