// The steps of a worker that belong to no round: replicas are compared, engine ranks catch up.
#include <string>
#include <utility>

#include "daemon/layout/stages.h"
#include "daemon/worker/step_context.h"

namespace weightd {

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
