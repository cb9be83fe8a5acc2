#include "daemon/worker/plan_store.h"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <utility>

#include "daemon/plan/rounds.h"
#include "daemon/wire/convert.h"

namespace weightd {
namespace {

/// Ranks of one group; a larger number on the wire is a mistake, not a plan.
constexpr uint32_t kMaxRanks = 1u << 16;

template <typename... Args>
Status Malformed(fmt::format_string<Args...> format, Args&&... args) {
  return Error(StatusCode::kInvalidArgument, reason::kProtocol,
               "run daemon and worker from the same release", format, std::forward<Args>(args)...);
}

bool Inside(const Box& box, const Shape& shape) {
  return box.num_dims() == shape.size() && Contains(WholeBox(shape), box);
}

Status CheckShards(const TensorTable& table, size_t rank, const RankShards& shards) {
  if (shards.first.size() != table.size() + 1) {
    return Malformed("plan lacks shards: actor={} tensors={} expected={}", rank,
                     shards.first.size() - 1, table.size());
  }
  for (size_t t = 0; t < table.size(); ++t) {
    for (uint32_t i = shards.first[t]; i < shards.first[t + 1]; ++i) {
      if (shards.box_index[i] >= shards.boxes.size()) {
        return Malformed("plan names a box that does not exist: actor={} tensor={} box={}", rank,
                         table[t].name, shards.box_index[i]);
      }
      const Box& box = shards.boxes[shards.box_index[i]];
      if (!Inside(box, table[t].shape)) {
        return WithTensor(Malformed("shard leaves its tensor: actor={} tensor={} box={} shape={}",
                                    rank, table[t].name, ToString(box), ToString(table[t].shape)),
                          table[t].name);
      }
    }
  }
  return absl::OkStatus();
}

Status CheckLayout(const TensorTable& table, const std::string& label, const RankLayout& layout) {
  for (const Write& write : layout.writes) {
    if (write.param >= layout.params.size()) {
      return Malformed("write names a parameter that does not exist: rank={} param={}", label,
                       write.param);
    }
    const ParamInfo& param = layout.params[write.param];
    if (!write.zero_fill && write.tensor >= table.size()) {
      return Malformed("write names a tensor that does not exist: rank={} param={} tensor={}",
                       label, param.name, write.tensor);
    }
    if (!Inside(write.target, param.shape) ||
        (!write.zero_fill && !Inside(write.source, table[write.tensor].shape))) {
      return WithTensor(
          Malformed("write leaves its tensor: rank={} param={} source={} target={}", label,
                    param.name, ToString(write.source), ToString(write.target)),
          param.name);
    }
  }
  return absl::OkStatus();
}

}  // namespace

Status PlanAssembler::AddShards(const v1::RankShardsPage& page) {
  if (page.source() >= kMaxRanks) return Malformed("actor is out of range: {}", page.source());
  if (page.source() >= input_.shards.size()) input_.shards.resize(page.source() + 1);
  RankShards& shards = input_.shards[page.source()];
  for (const v1::Box& proto : page.boxes()) {
    WEIGHTD_ASSIGN_OR_RETURN(Box box, FromProto(proto));
    shards.boxes.push_back(box);
  }
  if (shards.first.empty()) shards.first.push_back(0);
  uint64_t next = shards.first.back();
  for (uint32_t count : page.boxes_per_tensor()) {
    next += count;
    if (next > shards.box_index.size() + static_cast<size_t>(page.box_index_size())) {
      return Malformed("page lacks boxes: actor={}", page.source());
    }
    shards.first.push_back(static_cast<uint32_t>(next));
  }
  shards.box_index.insert(shards.box_index.end(), page.box_index().begin(), page.box_index().end());
  if (next != shards.box_index.size()) return Malformed("page has stray boxes: {}", page.source());
  return absl::OkStatus();
}

Status PlanAssembler::AddWrites(const v1::RankWritesPage& page) {
  if (page.target() >= kMaxRanks) {
    return Malformed("engine rank is out of range: {}", page.target());
  }
  if (page.target() >= input_.layouts.size()) {
    input_.layouts.resize(page.target() + 1);
    input_.targets.resize(page.target() + 1);
    input_.labels.resize(page.target() + 1);
    input_.target_devices.resize(page.target() + 1, kHostDevice);
  }
  if (page.member() != 0) input_.targets[page.target()] = page.member();
  if (!page.label().empty()) input_.labels[page.target()] = page.label();
  if (!page.device().empty()) input_.target_devices[page.target()] = page.device();
  RankLayout& layout = input_.layouts[page.target()];
  if (page.has_coordinates()) {
    WEIGHTD_ASSIGN_OR_RETURN(layout.coordinates, FromProto(page.coordinates()));
  }
  for (const v1::ParamSpec& spec : page.params()) {
    WEIGHTD_ASSIGN_OR_RETURN(ParamInfo param, FromProto(spec));
    layout.params.push_back(std::move(param));
  }
  for (const v1::WriteSpec& spec : page.writes()) {
    WEIGHTD_ASSIGN_OR_RETURN(Write write, FromProto(spec));
    layout.writes.push_back(write);
  }
  return absl::OkStatus();
}

Status PlanAssembler::Add(const v1::PlanPage& page) {
  for (const v1::TensorSpec& spec : page.tensors()) {
    WEIGHTD_ASSIGN_OR_RETURN(TensorInfo tensor, FromProto(spec));
    input_.table.push_back(std::move(tensor));
  }
  input_.sources.insert(input_.sources.end(), page.sources().begin(), page.sources().end());
  input_.source_devices.insert(input_.source_devices.end(), page.source_devices().begin(),
                               page.source_devices().end());
  for (const v1::RankShardsPage& shards : page.shards()) {
    WEIGHTD_RETURN_IF_ERROR(AddShards(shards));
  }
  for (const v1::RankWritesPage& writes : page.writes()) {
    WEIGHTD_RETURN_IF_ERROR(AddWrites(writes));
  }
  if (!page.last()) return absl::OkStatus();
  input_.digest = page.digest();
  if (page.window_bytes() != 0) input_.limits.bytes = page.window_bytes();
  if (page.window_operations() != 0) input_.limits.operations = page.window_operations();
  for (const v1::DevicePair& pair : page.wire_pairs()) {
    input_.wire_pairs.emplace(pair.source(), pair.target());
  }
  input_.wire_bytes = page.wire_bytes();
  return absl::OkStatus();
}

StatusOr<PlanInput> PlanAssembler::Finish() {
  if (input_.source_devices.empty()) {
    input_.source_devices.assign(input_.sources.size(), kHostDevice);
  }
  if (input_.source_devices.size() != input_.sources.size()) {
    return Malformed("plan has {} actors and the devices of {}", input_.sources.size(),
                     input_.source_devices.size());
  }
  if (!input_.wire_pairs.empty() && input_.wire_bytes < kMinWireBytes) {
    return Malformed("plan has too little staging for its wire: bytes={}", input_.wire_bytes);
  }
  if (input_.shards.size() != input_.sources.size()) {
    return Malformed("plan has {} actors and the shards of {}", input_.sources.size(),
                     input_.shards.size());
  }
  for (size_t rank = 0; rank < input_.shards.size(); ++rank) {
    if (input_.shards[rank].first.empty()) input_.shards[rank].first.push_back(0);
    WEIGHTD_RETURN_IF_ERROR(CheckShards(input_.table, rank, input_.shards[rank]));
  }
  for (size_t target = 0; target < input_.layouts.size(); ++target) {
    if (input_.targets[target] == 0) return Malformed("engine rank {} has no member", target);
    WEIGHTD_RETURN_IF_ERROR(
        CheckLayout(input_.table, input_.labels[target], input_.layouts[target]));
  }
  return std::exchange(input_, PlanInput());
}

namespace {

/// What all workers write into the engine ranks: per round, per engine rank.
using WholePlans = std::vector<std::vector<RankPlan>>;

/// What this worker stores into one engine rank in a round, out of what the rank receives.
RankPlan StoredCopies(const LoadedPlan& plan, uint32_t target, const RankLayout& layout,
                      const RankPlan& whole) {
  const PlanInput& in = plan.input;
  const std::string& device = in.target_devices[target];
  const bool own = device == plan.device;
  if (in.wire_pairs.contains({plan.device, device})) return RankPlan();
  const bool all_own =
      std::find(plan.own_sources.begin(), plan.own_sources.end(), false) == plan.own_sources.end();
  if (all_own && own) return whole;
  return OwnCopies(whole, layout, plan.own_sources, own);
}

/// The copies of one engine rank that the plan's worker stores, round by round. `whole` keeps what
/// a wire needs.
std::vector<RankRound> EnumerateRounds(uint32_t target, LoadedPlan* plan, WholePlans* whole) {
  const PlanInput& in = plan->input;
  std::vector<RankRound> rounds;
  if (NumRounds(NumStages(in.layouts[target].params)) == 1) {
    rounds.push_back({.layout = &in.layouts[target]});
  } else {
    for (RoundLayout& round : SplitRounds(in.layouts[target])) {
      plan->round_layouts.push_back(std::move(round.layout));
      rounds.push_back({.layout = &plan->round_layouts.back(), .params = std::move(round.params)});
    }
  }
  for (size_t i = 0; i < rounds.size(); ++i) {
    RankRound& round = rounds[i];
    RankPlan all = EnumerateRank(in.table, *plan->grid, *round.layout, in.limits);
    round.landed = all.bytes;
    round.plan = StoredCopies(*plan, target, *round.layout, all);
    if (in.wire_pairs.empty()) continue;
    if (whole->size() <= i) whole->emplace_back(in.layouts.size());
    (*whole)[i][target] = std::move(all);
  }
  return rounds;
}

/// The turns of each round. An engine rank that does not have a round has no copies in it.
void ScheduleWires(const WholePlans& whole, LoadedPlan* plan) {
  const PlanInput& in = plan->input;
  for (size_t round = 0; round < whole.size(); ++round) {
    std::vector<const RankLayout*> layouts;
    for (size_t i = 0; i < in.layouts.size(); ++i) {
      const std::vector<RankRound>& rounds = plan->ranks[i];
      layouts.push_back(round < rounds.size() ? rounds[round].layout : &in.layouts[i]);
    }
    plan->wires.push_back(ScheduleWire(
        {whole[round], layouts, in.source_devices, in.target_devices, in.wire_pairs, in.wire_bytes},
        plan->device));
    const WireSchedule& wire = plan->wires.back();
    plan->bytes +=
        std::accumulate(wire.receives.bytes.begin(), wire.receives.bytes.end(), uint64_t{0});
    plan->windows += wire.num_turns;
  }
}

}  // namespace

StatusOr<std::shared_ptr<const LoadedPlan>> LoadPlan(PlanInput input, std::string device) {
  static std::atomic<uint64_t> last_id{0};
  auto plan = std::make_shared<LoadedPlan>();  // shared by the store and a running step
  plan->id = ++last_id;
  plan->input = std::move(input);
  plan->device = std::move(device);
  for (const std::string& source : plan->input.source_devices) {
    plan->own_sources.push_back(source == plan->device);
  }
  const PlanInput& in = plan->input;
  if (in.sources.empty() && in.table.empty()) {  // a catch-up: parameters only, nothing to prove
    plan->ranks.resize(in.layouts.size());
    for (size_t i = 0; i < in.layouts.size(); ++i) {
      plan->ranks[i].push_back({.layout = &in.layouts[i]});
    }
    plan->stores.assign(in.layouts.size(), true);
    return std::shared_ptr<const LoadedPlan>(std::move(plan));
  }
  WEIGHTD_ASSIGN_OR_RETURN(plan->grid, SourceGrid::Build(in.table, in.shards));
  std::vector<const RankLayout*> layouts;
  for (size_t i = 0; i < in.layouts.size(); ++i) {
    layouts.push_back(&in.layouts[i]);
    WEIGHTD_RETURN_IF_ERROR(WithRank(CheckCoverage(in.table, in.layouts[i]), in.labels[i]));
    WEIGHTD_RETURN_IF_ERROR(WithRank(CheckStages(in.layouts[i].params), in.labels[i]));
  }
  plan->digest = PlanDigest(in.table, in.shards, layouts, in.limits);
  if (!std::equal(plan->digest.begin(), plan->digest.end(), in.digest.begin(), in.digest.end(),
                  [](uint8_t a, char b) { return a == static_cast<uint8_t>(b); })) {
    return Error(StatusCode::kFailedPrecondition, reason::kPlanMismatch,
                 "run daemon and worker from the same release",
                 "worker and daemon see different plans: tensors={} actors={} engine_ranks={}",
                 in.table.size(), in.shards.size(), in.layouts.size());
  }
  WholePlans whole;
  for (uint32_t i = 0; i < in.layouts.size(); ++i) {
    plan->ranks.push_back(EnumerateRounds(i, plan.get(), &whole));
    bool stores = in.target_devices[i] == plan->device;
    for (const RankRound& round : plan->ranks.back()) {
      plan->bytes += round.plan.bytes;
      plan->windows += static_cast<uint32_t>(round.plan.windows.size());
      stores = stores || !round.plan.copies.empty();
    }
    plan->stores.push_back(stores);
  }
  ScheduleWires(whole, plan.get());
  return std::shared_ptr<const LoadedPlan>(std::move(plan));
}

void PlanStore::Put(uint64_t handle, std::shared_ptr<const LoadedPlan> plan) {
  Drop(handle);
  const std::lock_guard lock(mutex_);
  entries_.push_front({.handle = handle, .plan = std::move(plan)});
  if (entries_.size() > kMaxPlans) entries_.pop_back();
}

void PlanStore::Drop(uint64_t handle) {
  const std::lock_guard lock(mutex_);
  entries_.remove_if([handle](const Entry& entry) { return entry.handle == handle; });
}

StatusOr<std::shared_ptr<const LoadedPlan>> PlanStore::Get(uint64_t handle) {
  const std::lock_guard lock(mutex_);
  const auto it = std::find_if(entries_.begin(), entries_.end(),
                               [handle](const Entry& entry) { return entry.handle == handle; });
  if (it == entries_.end()) {
    return Error(StatusCode::kFailedPrecondition, reason::kNoPlan, "send the plan again",
                 "worker does not hold the plan any more: plan={}", handle);
  }
  entries_.splice(entries_.begin(), entries_, it);
  return it->plan;
}

}  // namespace weightd
