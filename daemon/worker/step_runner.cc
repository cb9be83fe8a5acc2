#include "daemon/worker/step_runner.h"

#include <algorithm>
#include <string>
#include <thread>
#include <utility>

#include "daemon/base/failpoint.h"
#include "daemon/wire/convert.h"
#include "daemon/worker/step_context.h"

namespace weightd {
namespace {

/// Windows after which a test can stop a worker.
constexpr uint32_t kFailpointWindows = 3;

/// A transfer tells how far it has come about this often, and where a target is complete.
constexpr uint64_t kLandedReports = 32;

/// A trainer's event mostly has passed already, or passes soon.
constexpr microseconds kFenceSpin{500};
constexpr microseconds kFenceNap{50};

std::string_view PhaseOf(v1::Step step) {
  switch (step) {
    case v1::STEP_TRANSFER:
      return "transfer";
    case v1::STEP_VERIFY:
      return "verify";
    case v1::STEP_CHECK_REPLICAS:
      return "prepare";
    default:
      return "catch_up";
  }
}

/// After what is stored into it directly.
bool ReceivesOverWire(const LoadedPlan& plan, uint32_t round, uint32_t target) {
  if (round >= plan.wires.size()) return false;
  const std::vector<uint32_t>& targets = plan.wires[round].receives.targets;
  return std::find(targets.begin(), targets.end(), target) != targets.end();
}

void AddDigests(uint32_t target, const RankDigests& digests, v1::StepDone* done) {
  v1::TargetDigests& result = *done->add_digests();
  result.set_target(target);
  result.mutable_tensors()->Add(digests.tensors.begin(), digests.tensors.end());
  result.mutable_words()->Add(digests.words.begin(), digests.words.end());
}

}  // namespace

StepRunner::StepRunner(MemberTable* members, PlanStore* plans, const Movers& movers,
                       int num_threads, ReportFn report)
    : members_(members),
      plans_(plans),
      transport_(movers.transport),
      verifier_(movers.verifier),
      wires_(movers.wires),
      report_(std::move(report)),
      catch_up_(num_threads) {}

v1::StepDone StepRunner::Run(const v1::RunStep& command, std::atomic<bool>* cancelled,
                             const LandedByTarget* landed) {
  v1::StepDone done;
  *done.mutable_attempt() = command.attempt();
  done.set_step(command.step());
  Context context{.command = command, .cancelled = cancelled, .landed = landed};
  if (command.deadline_us() != 0) {
    context.deadline = Clock::now() + microseconds(command.deadline_us());
  }
  Status status = Dispatch(&context, &done);
  if (!status.ok()) {
    const Status lost = context.pinned.lost();
    if (!lost.ok()) status = lost;
    done.clear_digests();
    *done.mutable_error() = ToProto(WithPhase(std::move(status), PhaseOf(command.step())));
  }
  done.set_staging_bytes(members_->staging_bytes() +
                         (wires_ == nullptr ? 0 : wires_->staging_bytes()));
  return done;
}

Status StepRunner::CheckTargets(const Context& context) const {
  const v1::Step step = context.command.step();
  const bool copies = step == v1::STEP_COPY_PEER;
  const bool needs_grid =
      step == v1::STEP_TRANSFER || step == v1::STEP_VERIFY || step == v1::STEP_CHECK_REPLICAS;
  if (needs_grid && !context.plan->grid.has_value()) {
    return Error(StatusCode::kFailedPrecondition, reason::kNoPlan, "send the whole plan",
                 "plan of a catch-up has no tensors to transfer: plan={}", context.command.plan());
  }
  for (uint32_t target : context.command.targets()) {
    const auto& ranks = context.plan->ranks;
    if (target < ranks.size() && context.command.round() < ranks[target].size()) continue;
    return Error(StatusCode::kInvalidArgument, reason::kProtocol,
                 "run daemon and worker from the same release",
                 "step names an engine rank or a round that the plan does not have: target={} "
                 "ranks={} round={}",
                 target, ranks.size(), context.command.round());
  }
  if (copies && context.command.peers_size() != context.command.targets_size()) {
    return Error(StatusCode::kInvalidArgument, reason::kProtocol,
                 "run daemon and worker from the same release",
                 "copy needs one peer for each target: targets={} peers={}",
                 context.command.targets_size(), context.command.peers_size());
  }
  return absl::OkStatus();
}

Status StepRunner::Dispatch(Context* context, v1::StepDone* done) {
  const v1::RunStep& command = context->command;
  WEIGHTD_ASSIGN_OR_RETURN(context->plan, plans_->Get(command.plan()));
  WEIGHTD_RETURN_IF_ERROR(CheckTargets(*context));
  const PlanInput& input = context->plan->input;
  const bool reads_sources =
      command.step() == v1::STEP_TRANSFER || command.step() == v1::STEP_CHECK_REPLICAS;
  for (size_t rank = 0; reads_sources && rank < input.sources.size(); ++rank) {
    if (context->plan->own_sources[rank]) context->members.push_back(input.sources[rank]);
  }
  if (command.step() != v1::STEP_CHECK_REPLICAS) {
    for (uint32_t target : command.targets()) {
      if (command.step() == v1::STEP_TRANSFER && !context->plan->stores[target]) continue;
      context->members.push_back(input.targets[target]);
    }
  }
  context->members.insert(context->members.end(), command.peers().begin(), command.peers().end());
  WEIGHTD_RETURN_IF_ERROR(members_->Pin(context->members, context->cancelled, &context->pinned));
  WEIGHTD_RETURN_IF_ERROR(CheckIntactBefore(context->pinned, context->members));
  if (reads_sources) WEIGHTD_RETURN_IF_ERROR(AwaitSources(*context));
  switch (command.step()) {
    case v1::STEP_TRANSFER:
      WEIGHTD_RETURN_IF_ERROR(Transfer(context, done));
      break;
    case v1::STEP_VERIFY:
      WEIGHTD_RETURN_IF_ERROR(Verify(context, done));
      break;
    case v1::STEP_CHECK_REPLICAS:
      WEIGHTD_RETURN_IF_ERROR(CheckReplicas(context, done));
      break;
    case v1::STEP_COPY_PEER:
    case v1::STEP_RETAIN:
    case v1::STEP_RESTORE:
      WEIGHTD_RETURN_IF_ERROR(CatchUpTargets(context, done));
      break;
    default:
      return Error(StatusCode::kInvalidArgument, reason::kProtocol,
                   "run daemon and worker from the same release", "unknown step: step={}",
                   static_cast<int>(command.step()));
  }
  // What was read or written while an object shrank was not its owner's memory.
  return CheckIntactAfter(context->pinned, context->members);
}

/// Waits until the trainers' GPUs have produced what the step reads. A look, not a wait of the
/// stream: a trainer that dies meanwhile leaves nothing stuck on this worker's GPU.
Status StepRunner::AwaitSources(const Context& context) const {
  for (uint64_t id : context.members) {
    const PinnedMembers::Entry& entry = *context.pinned.Find(id);
    const LenderFence* fence = entry.memory->fence.get();
    for (const Clock::time_point begin = Clock::now(); fence != nullptr;) {
      WEIGHTD_ASSIGN_OR_RETURN(const bool passed, fence->Passed());
      if (passed) break;
      if (context.cancelled->load()) {
        return Error(StatusCode::kCancelled, reason::kCancelled, "sync again",
                     "step was cancelled while it waited for a trainer's GPU: rank={}",
                     entry.member->label());
      }
      if (Clock::now() >= context.deadline) {
        return WithRank(Error(StatusCode::kDeadlineExceeded, reason::kDeadline,
                              "sync after the training step has ended, or raise the deadline",
                              "trainer's GPU was still busy: rank={}", entry.member->label()),
                        entry.member->label());
      }
      if (Clock::now() - begin > kFenceSpin) std::this_thread::sleep_for(kFenceNap);
    }
  }
  return absl::OkStatus();
}

void StepRunner::Progress(Context* context, uint64_t bytes, uint32_t windows,
                          const std::string& layer) {
  const Clock::time_point now = Clock::now();
  if (now - context->reported < kProgressInterval) return;
  context->reported = now;
  v1::WorkerReport report;
  v1::TransferProgress& progress = *report.mutable_progress();
  *progress.mutable_attempt() = context->command.attempt();
  progress.set_bytes_done(context->bytes_before + bytes);
  progress.set_bytes_total(context->bytes_total);
  progress.set_window(windows);
  progress.set_layer(layer);
  progress.set_step(context->command.step());
  report_(std::move(report));
}

/// Tells the daemon that nothing of these writes is still to come from here. The step's end says so
/// for all of them.
void StepRunner::TellLanded(Context* context, uint32_t target, uint32_t writes) {
  uint64_t& told = context->bytes_told[target];
  const uint64_t moved = context->bytes_now - told;
  const bool due = writes == kAllLanded || moved * kLandedReports >= context->bytes_total;
  if (writes == 0 || !due || context->bytes_now == context->bytes_total) return;
  told = context->bytes_now;
  v1::WorkerReport report;
  v1::Landed& landed = *report.mutable_landed();
  *landed.mutable_attempt() = context->command.attempt();
  landed.set_round(context->command.round());
  landed.set_target(target);
  landed.set_writes(writes);
  report_(std::move(report));
}

RunControl StepRunner::ControlOf(Context* context, StagedSource* staged) {
  RunControl control;
  control.cancelled = context->cancelled;
  control.deadline = context->deadline;
  control.staged = staged;
  const bool transfers = context->command.step() == v1::STEP_TRANSFER;
  control.on_window = [this, context, transfers](uint32_t windows, uint64_t bytes,
                                                 const std::string& layer) {
    const uint32_t index = windows - 1;
    if (transfers && index < kFailpointWindows) Failpoint(fmt::format("window.{}", index));
    context->bytes_now = context->bytes_before + bytes;
    Progress(context, bytes, windows, layer);
  };
  return control;
}

Status StepRunner::Transfer(Context* context, v1::StepDone* done) {
  const LoadedPlan& plan = *context->plan;
  const uint32_t round = context->command.round();
  BoundPlan bound;
  WEIGHTD_RETURN_IF_ERROR(BindSources(plan, context->pinned, &bound));
  std::vector<uint32_t> targets;
  for (uint32_t target : context->command.targets()) {
    if (!plan.stores[target]) {
      DescribeEngineRank(plan, target, round, &bound);
      continue;
    }
    WEIGHTD_RETURN_IF_ERROR(BindEngineRank(plan, target, round, context->pinned, &bound));
    context->bytes_total += plan.ranks[target][round].plan.bytes;
    targets.push_back(target);
  }
  RingSource staged(plan, context->pinned, context->command.attempt(), context->cancelled,
                    context->deadline);
  RunControl control = ControlOf(context, &staged);
  const bool wired = round < plan.wires.size() && plan.wires[round].num_turns > 0;
  if (wired) context->bytes_total += plan.wires[round].receives.TotalBytes();
  control.on_landed = [&](uint32_t target, uint32_t writes) {
    if (!ReceivesOverWire(plan, round, target)) TellLanded(context, target, writes);
  };
  done->set_touched(!targets.empty());
  WEIGHTD_ASSIGN_OR_RETURN(const std::vector<RankDigests> digests,
                           transport_->TransferAll(bound, targets, control));
  for (size_t i = 0; i < targets.size(); ++i) AddDigests(targets[i], digests[i], done);
  done->set_bytes(context->bytes_now);
  return wired ? TransferOverWire(context, bound, done) : absl::OkStatus();
}

/// After what this worker stores directly: its turns of the wire.
Status StepRunner::TransferOverWire(Context* context, const BoundPlan& bound, v1::StepDone* done) {
  const LoadedPlan& plan = *context->plan;
  const WireSchedule& wire = plan.wires[context->command.round()];
  if (wires_ == nullptr) {
    return Error(StatusCode::kUnimplemented, reason::kNoPath, "report this with the log",
                 "worker has no wires: device={}", plan.device);
  }
  context->bytes_before = context->bytes_now;
  RunControl control = ControlOf(context, nullptr);
  control.on_window = [&](uint32_t turns, uint64_t bytes, const std::string& layer) {
    if (turns <= kFailpointWindows) Failpoint(fmt::format("wire.{}.{}", plan.device, turns - 1));
    context->bytes_now = context->bytes_before + bytes;
    Progress(context, bytes, turns, layer);
  };
  control.on_landed = [&](uint32_t target, uint32_t writes) {
    TellLanded(context, target, writes);
  };
  const auto turn_limit =
      std::chrono::duration_cast<milliseconds>(microseconds(context->command.turn_deadline_us()));
  WEIGHTD_ASSIGN_OR_RETURN(const WireTransport::Digests digests,
                           wires_->Transfer(context->command.plan(), context->command.wire(), bound,
                                            wire, control, turn_limit));
  for (const auto& [target, words] : digests) AddDigests(target, words, done);
  done->set_bytes(context->bytes_total);
  return absl::OkStatus();
}

Status StepRunner::Verify(Context* context, v1::StepDone* done) {
  const LoadedPlan& plan = *context->plan;
  const uint32_t round = context->command.round();
  Failpoint("worker.before_verify");
  BoundPlan bound;
  for (uint32_t target : context->command.targets()) {
    WEIGHTD_RETURN_IF_ERROR(BindEngineRank(plan, target, round, context->pinned, &bound));
    context->bytes_total += plan.ranks[target][round].landed;
  }
  RunControl control = ControlOf(context, nullptr);
  for (uint32_t target : context->command.targets()) {
    control.beside_wire = ReceivesOverWire(plan, round, target);
    control.landed = context->landed == nullptr ? nullptr : &context->landed->at(target);
    WEIGHTD_ASSIGN_OR_RETURN(const RankDigests digests, verifier_->Verify(bound, target, control));
    AddDigests(target, digests, done);
    context->bytes_before += plan.ranks[target][round].landed;
    done->set_bytes(context->bytes_before);
  }
  return absl::OkStatus();
}

}  // namespace weightd
