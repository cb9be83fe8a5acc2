#include "daemon/worker/step_runner.h"

#include <numeric>
#include <string>
#include <thread>
#include <utility>

#include "daemon/base/failpoint.h"
#include "daemon/layout/stages.h"
#include "daemon/wire/convert.h"

namespace weightd {
namespace {

/// Windows after which a test can stop a worker.
constexpr uint32_t kFailpointWindows = 3;

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

void AddDigests(uint32_t target, const RankDigests& digests, v1::StepDone* done) {
  v1::TargetDigests& result = *done->add_digests();
  result.set_target(target);
  result.mutable_tensors()->Add(digests.tensors.begin(), digests.tensors.end());
  result.mutable_words()->Add(digests.words.begin(), digests.words.end());
}

}  // namespace

/// What one run of a step knows.
struct StepRunner::Context {
  const v1::RunStep& command;
  std::atomic<bool>* cancelled = nullptr;
  Clock::time_point deadline = Clock::time_point::max();
  std::shared_ptr<const LoadedPlan> plan;  ///< shared with the store, which may drop it meanwhile
  std::vector<uint64_t> members;           ///< all that the step uses
  PinnedMembers pinned;
  uint64_t bytes_total = 0;
  uint64_t bytes_before = 0;  ///< of the targets that are done
  Clock::time_point reported = Clock::now();
};

StepRunner::StepRunner(MemberTable* members, PlanStore* plans, Transport* transport,
                       WireTransport* wires, int num_threads, ReportFn report)
    : members_(members),
      plans_(plans),
      transport_(transport),
      wires_(wires),
      report_(std::move(report)),
      catch_up_(num_threads) {}

v1::StepDone StepRunner::Run(const v1::RunStep& command, std::atomic<bool>* cancelled) {
  v1::StepDone done;
  *done.mutable_attempt() = command.attempt();
  done.set_step(command.step());
  Context context{.command = command, .cancelled = cancelled};
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
  done->set_touched(!targets.empty());
  WEIGHTD_ASSIGN_OR_RETURN(const std::vector<RankDigests> digests,
                           transport_->TransferAll(bound, targets, control));
  for (size_t i = 0; i < targets.size(); ++i) AddDigests(targets[i], digests[i], done);
  done->set_bytes(context->bytes_total);
  if (round >= plan.wires.size() || plan.wires[round].num_turns == 0) return absl::OkStatus();
  return TransferOverWire(context, bound, done);
}

/// After what this worker stores directly: its turns of the wire.
Status StepRunner::TransferOverWire(Context* context, const BoundPlan& bound, v1::StepDone* done) {
  const LoadedPlan& plan = *context->plan;
  const WireSchedule& wire = plan.wires[context->command.round()];
  if (wires_ == nullptr) {
    return Error(StatusCode::kUnimplemented, reason::kNoPath, "report this with the log",
                 "worker has no wires: device={}", plan.device);
  }
  context->bytes_before = context->bytes_total;
  RunControl control = ControlOf(context, nullptr);
  control.on_window = [&](uint32_t turns, uint64_t bytes, const std::string& layer) {
    if (turns <= kFailpointWindows) Failpoint(fmt::format("wire.{}.{}", plan.device, turns - 1));
    Progress(context, bytes, turns, layer);
  };
  const auto turn_limit =
      std::chrono::duration_cast<milliseconds>(microseconds(context->command.turn_deadline_us()));
  WEIGHTD_ASSIGN_OR_RETURN(const WireTransport::Digests digests,
                           wires_->Transfer(context->command.plan(), context->command.wire(), bound,
                                            wire, control, turn_limit));
  for (const auto& [target, words] : digests) AddDigests(target, words, done);
  done->set_bytes(done->bytes() + std::accumulate(wire.receives.bytes.begin(),
                                                  wire.receives.bytes.end(), uint64_t{0}));
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
    WEIGHTD_ASSIGN_OR_RETURN(const RankDigests digests, transport_->Verify(bound, target, control));
    AddDigests(target, digests, done);
    context->bytes_before += plan.ranks[target][round].landed;
    done->set_bytes(context->bytes_before);
  }
  return absl::OkStatus();
}

Status StepRunner::CheckReplicas(Context* context, v1::StepDone* done) {
  const LoadedPlan& plan = *context->plan;
  BoundPlan bound;
  WEIGHTD_RETURN_IF_ERROR(BindSources(plan, context->pinned, &bound));
  RingSource staged(plan, context->pinned, context->command.attempt(), context->cancelled,
                    context->deadline);
  RunControl control = ControlOf(context, &staged);
  Status status;
  plan.grid->ForEachReplicated([&](const SourceGrid::ReplicatedShard& replica) {
    if (status.ok()) status = CompareReplica(context, bound, replica, &control, done);
  });
  return status;
}

/// Compares the copies of a shard that this device has. Where others have copies, too, the word
/// goes to the daemon, which compares those of all workers.
Status StepRunner::CompareReplica(Context* context, const BoundPlan& bound,
                                  const SourceGrid::ReplicatedShard& replica, RunControl* control,
                                  v1::StepDone* done) {
  const PlanInput& input = context->plan->input;
  uint64_t expected = 0;
  size_t own = 0;
  std::string same;
  std::string different;
  for (size_t i = 0; i < replica.ranks.size(); ++i) {
    const uint32_t rank = replica.ranks[i];
    if (!context->plan->own_sources[rank]) continue;
    WEIGHTD_ASSIGN_OR_RETURN(
        const uint64_t word,
        transport_->DigestShard(bound, rank, replica.tensor, replica.shards[i], *control));
    if (own++ == 0) expected = word;
    std::string& list = word == expected ? same : different;
    const std::string& label = context->pinned.Find(input.sources[rank])->member->label();
    list += (list.empty() ? "" : ", ") + label;
  }
  if (own > 0 && own < replica.ranks.size()) done->add_shard_words(expected);
  if (different.empty()) return absl::OkStatus();
  const std::string& name = input.table[replica.tensor].name;
  Status status = Error(StatusCode::kFailedPrecondition, reason::kReplicasDiffer,
                        "make the replicas equal in the trainer (broadcast parameters), or sync "
                        "without check_replicas",
                        "replicated shards differ: tensor={} box={} [{}] differ from [{}]", name,
                        ToString(replica.box), different, same);
  return WithRank(WithTensor(std::move(status), name), different);
}

Status StepRunner::CatchUpOne(Context* context, uint32_t target, uint64_t peer,
                              const BoundPlan& bound, const CatchUp::Control& control) {
  const std::span<const Binding> params = bound.targets[target].params;
  const RankLayout& layout = context->plan->input.layouts[target];
  const std::string& label = context->plan->input.labels[target];
  const uint64_t version = context->command.version();
  if (NumStages(layout.params) > 1) {
    return Error(StatusCode::kFailedPrecondition, reason::kStaged, "sync the engine instead",
                 "lent memory does not hold the model, since stages share it: rank={} stages={}",
                 label, NumStages(layout.params));
  }
  if (!transport_->host_memory() && context->command.step() != v1::STEP_COPY_PEER) {
    return Error(StatusCode::kUnimplemented, reason::kDevice, "set catch_up.retain = \"none\"",
                 "this build keeps no copies of GPU memory: rank={}", label);
  }
  if (context->command.step() == v1::STEP_RETAIN) {
    return catch_up_.Retain(label, version, layout, params, control);
  }
  if (context->command.step() == v1::STEP_RESTORE) {
    return catch_up_.Restore(label, version, layout, params, control);
  }
  const PinnedMembers::Entry& entry = *context->pinned.Find(peer);
  WEIGHTD_ASSIGN_OR_RETURN(const std::vector<Binding> from,
                           BindParams(layout, {}, entry.member->label(), *entry.memory));
  if (transport_->host_memory()) return catch_up_.Copy(layout, from, params, control);
  RunControl window_control = ControlOf(context, nullptr);
  return transport_->CopyParams(bound, target, from, window_control);
}

Status StepRunner::CatchUpTargets(Context* context, v1::StepDone* done) {
  const LoadedPlan& plan = *context->plan;
  BoundPlan bound;
  for (uint32_t target : context->command.targets()) {
    WEIGHTD_RETURN_IF_ERROR(BindEngineRank(plan, target, 0, context->pinned, &bound));
    context->bytes_total += ParamBytes(plan.input.layouts[target]);
  }
  CatchUp::Control control;
  control.cancelled = context->cancelled;
  control.deadline = context->deadline;
  control.on_bytes = [this, context](uint64_t bytes) { Progress(context, bytes, 0, ""); };
  for (int i = 0; i < context->command.targets_size(); ++i) {
    const uint32_t target = context->command.targets(i);
    const uint64_t peer = i < context->command.peers_size() ? context->command.peers(i) : 0;
    if (context->command.step() != v1::STEP_RETAIN) done->set_touched(true);
    WEIGHTD_RETURN_IF_ERROR(
        WithRank(CatchUpOne(context, target, peer, bound, control), plan.input.labels[target]));
    context->bytes_before += ParamBytes(plan.input.layouts[target]);
    done->set_bytes(context->bytes_before);
  }
  return absl::OkStatus();
}

}  // namespace weightd
