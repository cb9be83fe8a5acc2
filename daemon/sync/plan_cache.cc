#include "daemon/sync/plan_cache.h"

#include <algorithm>

namespace weightd {
namespace {

std::string Hex(std::span<const uint8_t> bytes) {
  return fmt::format("{:02x}", fmt::join(bytes, ""));
}

/// How many of a table's tensors a layout reads.
size_t NumTensors(const RankLayout& layout, size_t table_size) {
  std::vector<bool> read(table_size);
  for (const Write& write : layout.writes) {
    if (!write.zero_fill) read[write.tensor] = true;
  }
  return static_cast<size_t>(std::count(read.begin(), read.end(), true));
}

/// Chooses the path of every pair of devices between which bytes move.
Status ChoosePaths(const CompiledPlan& compiled, const PathPolicy& policy, WorkerPlan& worker,
                   ReplicaPlan& plan) {
  for (size_t target = 0; target < worker.targets.size(); ++target) {
    for (size_t actor = 0; actor < compiled.num_actors; ++actor) {
      const PairTraffic& traffic = compiled.pair(actor, target);
      if (traffic.boxes == 0) continue;
      const Place from{worker.source_devices[actor]};
      const Place to{worker.target_devices[target]};
      StatusOr<PathChoice> choice = ChoosePath(from, to, ThisBuild(), policy);
      if (!choice.ok()) return WithRank(choice.status(), worker.labels[target]);
      if (IsWire(choice->path)) worker.wire_pairs.emplace(from.device, to.device);
      if (traffic.pulled_boxes < traffic.boxes) {
        plan.path_bytes[std::string(Name(choice->path))] += traffic.bytes - traffic.pulled_bytes;
      }
      plan.paths.emplace(std::pair(from.device, to.device), *std::move(choice));
      if (traffic.pulled_boxes == 0) continue;
      WEIGHTD_ASSIGN_OR_RETURN(PathChoice pull,
                               ChoosePath(from, {to.device, false}, ThisBuild(), policy));
      plan.path_bytes[std::string(Name(pull.path))] += traffic.pulled_bytes;
      plan.pulls.emplace(std::pair(from.device, to.device), std::move(pull));
    }
  }
  return absl::OkStatus();
}

void AddLayout(RankLayout layout, const GroupView& group, ResolvedReplica* resolved) {
  resolved->num_tensors.push_back(NumTensors(layout, group.table->size()));
  resolved->layouts.push_back(std::make_shared<const RankLayout>(SplitStages(std::move(layout))));
}

/// The layouts that a replica's ranks saw their engine's loader produce.
Status ResolveTraced(const GroupView& group, const ReplicaView& replica,
                     ResolvedReplica* resolved) {
  TraceBinder binder(*group.table);
  for (const TargetView& target : replica.targets) {
    const EngineRank& rank = *target.rank;
    StatusOr<RankLayout> layout = binder.Lower(*rank.traced, rank.coordinates, rank.params);
    if (!layout.ok()) return WithRank(layout.status(), rank.label);
    AddLayout(*std::move(layout), group, resolved);
  }
  resolved->loader = kTracedOrigin;
  WEIGHTD_ASSIGN_OR_RETURN(resolved->skipped, binder.Skipped());
  return absl::OkStatus();
}

/// The layouts that a rule file gives a replica's ranks.
Status ResolveRules(const LoaderRegistry& loaders, const GroupView& group,
                    const ReplicaView& replica, ResolvedReplica* resolved) {
  WEIGHTD_ASSIGN_OR_RETURN(const std::shared_ptr<const Loader> loader,
                           loaders.Find(replica.model.architecture, replica.model.profile));
  const std::vector<ParamInfo>& reported = replica.targets.front().rank->params;
  WEIGHTD_ASSIGN_OR_RETURN(
      const std::shared_ptr<const BoundLoader> bound,
      loader->Bind(*group.table, replica.model.config_json, replica.model.architecture,
                   replica.model.profile, reported));
  resolved->loader = loader->origin();
  resolved->skipped = bound->skipped();
  for (const TargetView& target : replica.targets) {
    StatusOr<RankLayout> layout = bound->Lower(target.rank->coordinates, target.rank->params);
    if (!layout.ok()) return WithRank(layout.status(), target.rank->label);
    AddLayout(*std::move(layout), group, resolved);
  }
  return absl::OkStatus();
}

}  // namespace

std::string LayoutKey(const ReplicaView& replica) {
  std::string key = fmt::format("{} {}", replica.model.architecture, replica.model.profile);
  for (const TargetView& target : replica.targets) {
    TensorTable params;
    for (const ParamInfo& param : target.rank->params) {
      params.push_back({param.name, param.shape, param.dtype});
    }
    const EngineCoordinates& at = target.rank->coordinates;
    key += fmt::format("|{}/{} {}/{} {}/{} {}", at.tp_rank, at.tp_size, at.pp_rank, at.pp_size,
                       at.ep_rank, at.ep_size, Hex(TableDigest(params)));
    if (target.rank->traced != nullptr) key += " " + Hex(target.rank->traced->digest());
  }
  return key;
}

uint64_t PlanCache::NextHandle() {
  static std::atomic<uint64_t> next{1};
  return next.fetch_add(1);
}

std::string PlanCache::Key(const GroupView& group, const ReplicaView& replica) {
  return fmt::format("{}#{} {}/{}#{}", group.id, group.generation, replica.engine, replica.dp_rank,
                     replica.generation);
}

StatusOr<std::shared_ptr<const ResolvedReplica>> PlanCache::Resolve(const GroupView& group,
                                                                    const ReplicaView& replica) {
  const std::lock_guard lock(mu_);
  Entry& entry = entries_[Key(group, replica)];
  if (entry.resolved != nullptr) return entry.resolved;
  const auto start = Clock::now();
  auto resolved = std::make_shared<ResolvedReplica>();
  resolved->layout_key = LayoutKey(replica);
  WEIGHTD_RETURN_IF_ERROR(replica.model.traced
                              ? ResolveTraced(group, replica, resolved.get())
                              : ResolveRules(*loaders_, group, replica, resolved.get()));
  on_compiled_(static_cast<double>(MicrosSince(start)) * 1e-6);
  entry.resolved = std::move(resolved);
  return entry.resolved;
}

StatusOr<std::shared_ptr<const ReplicaPlan>> PlanCache::Plan(const GroupView& group,
                                                             const ReplicaView& replica) {
  const std::lock_guard lock(mu_);
  Entry& entry = entries_[Key(group, replica)];
  WEIGHTD_CHECK(entry.resolved != nullptr);
  if (entry.plan == nullptr) {
    WEIGHTD_ASSIGN_OR_RETURN(entry.plan, Compile(group, replica, entry.resolved));
  }
  return entry.plan;
}

StatusOr<std::shared_ptr<const ReplicaPlan>> PlanCache::Compile(
    const GroupView& group, const ReplicaView& replica,
    std::shared_ptr<const ResolvedReplica> resolved) {
  const auto start = Clock::now();
  std::vector<RankShards> shards;
  auto worker = std::make_shared<WorkerPlan>();
  worker->handle = NextHandle();
  worker->table = group.table;
  for (const auto& rank : group.ranks) {
    shards.push_back(rank->shards);
    worker->shards.emplace_back(rank, &rank->shards);
    worker->sources.push_back(rank->member);
    worker->source_devices.push_back(rank->device);
  }
  std::vector<const RankLayout*> layouts;
  for (size_t i = 0; i < replica.targets.size(); ++i) {
    layouts.push_back(resolved->layouts[i].get());
    worker->layouts.push_back(resolved->layouts[i]);
    worker->targets.push_back(replica.targets[i].rank->member);
    worker->labels.push_back(replica.targets[i].rank->label);
    worker->target_devices.push_back(replica.targets[i].rank->device);
  }
  worker->limits = limits_;
  WEIGHTD_ASSIGN_OR_RETURN(CompiledPlan compiled,
                           CompilePlan(*group.table, shards, layouts, resolved->skipped, limits_));
  worker->digest = compiled.digest;
  auto plan = std::make_shared<ReplicaPlan>();
  WEIGHTD_RETURN_IF_ERROR(ChoosePaths(compiled, policy_, *worker, *plan));
  if (!worker->wire_pairs.empty()) worker->wire_bytes = wire_bytes_;
  plan->shares =
      ShareWork(compiled, worker->source_devices, worker->target_devices, worker->wire_pairs);
  on_compiled_(static_cast<double>(MicrosSince(start)) * 1e-6);
  plan->resolved = std::move(resolved);
  plan->compiled = std::make_shared<const CompiledPlan>(std::move(compiled));
  plan->worker = std::move(worker);
  return plan;
}

std::vector<PlanCache::OpenWire> PlanCache::DropWiresOf(MemberId member) {
  const auto has = [member](const std::vector<MemberId>& members) {
    return std::find(members.begin(), members.end(), member) != members.end();
  };
  std::vector<OpenWire> dropped;
  const std::lock_guard lock(mu_);
  for (const auto& [key, entry] : entries_) {
    if (entry.plan == nullptr) continue;
    const WorkerPlan& plan = *entry.plan->worker;
    if (!has(plan.sources) && !has(plan.targets)) continue;
    auto wire = wires_.extract(plan.handle);
    if (!wire.empty()) dropped.push_back(std::move(wire.mapped()));
  }
  return dropped;
}

std::shared_ptr<const ReplicaPlan> PlanCache::Find(const GroupView& group,
                                                   const ReplicaView& replica) const {
  const std::lock_guard lock(mu_);
  const auto it = entries_.find(Key(group, replica));
  return it == entries_.end() ? nullptr : it->second.plan;
}

bool PlanCache::Loaded(uint64_t handle, const std::string& device) const {
  const std::lock_guard lock(mu_);
  return loaded_.contains({handle, device});
}

void PlanCache::MarkLoaded(uint64_t handle, const std::string& device) {
  const std::lock_guard lock(mu_);
  loaded_.emplace(handle, device);
}

void PlanCache::ForgetLoaded(const std::string& device) {
  const std::lock_guard lock(mu_);
  std::erase_if(loaded_, [&](const auto& entry) { return entry.second == device; });
  std::erase_if(wires_, [&](const auto& entry) {
    const std::vector<std::string>& devices = entry.second.devices;
    return std::find(devices.begin(), devices.end(), device) != devices.end();
  });
}

void PlanCache::SetPolicy(const PathPolicy& policy) {
  const std::lock_guard lock(mu_);
  if (policy == policy_) return;
  policy_ = policy;
  for (auto& [key, entry] : entries_) entry.plan = nullptr;
}

uint64_t PlanCache::FindWire(uint64_t handle) const {
  const std::lock_guard lock(mu_);
  const auto it = wires_.find(handle);
  return it == wires_.end() ? 0 : it->second.wire;
}

void PlanCache::KeepWire(uint64_t handle, uint64_t wire, const std::vector<std::string>& devices) {
  const std::lock_guard lock(mu_);
  wires_[handle] = {wire, devices};
}

void PlanCache::DropWire(uint64_t handle) {
  const std::lock_guard lock(mu_);
  wires_.erase(handle);
}

std::vector<uint64_t> PlanCache::Trim(const GroupView& group,
                                      const std::vector<ReplicaView>& alive) {
  std::set<std::string> keep;
  for (const ReplicaView& replica : alive) keep.insert(Key(group, replica));
  std::vector<uint64_t> dropped;
  const std::lock_guard lock(mu_);
  std::erase_if(entries_, [&](const auto& item) {
    if (keep.contains(item.first)) return false;
    if (item.second.plan != nullptr) dropped.push_back(item.second.plan->worker->handle);
    return true;
  });
  for (uint64_t handle : dropped) {
    std::erase_if(loaded_, [handle](const auto& entry) { return entry.first == handle; });
    wires_.erase(handle);
  }
  return dropped;
}

}  // namespace weightd
