#include "daemon/transport/ipc/ipc_transport.h"

#include <algorithm>
#include <deque>
#include <thread>
#include <utility>

#include "daemon/device/cuda/device.h"

namespace weightd {
namespace {

constexpr uint64_t kTransfer = 1;
constexpr uint64_t kVerify = 2;

/// A wait begins by spinning, since most steps of small models end within it, then sleeps.
constexpr microseconds kSpin{500};
constexpr microseconds kNap{20};

/// Blocks per multiprocessor for local work while the remote lane runs: half of what fits.
constexpr int kBlocksBeside = 2;

/// What a table depends on; empty if the plan cannot be told from others.
std::vector<uint64_t> KeyOf(const BoundPlan& plan, size_t target, uint64_t kind) {
  std::vector<uint64_t> key;
  if (plan.id == 0) return key;
  key = {kind, plan.id, target, plan.targets[target].round, plan.targets[target].registration};
  if (kind == kTransfer) {
    key.insert(key.end(), plan.registrations.begin(), plan.registrations.end());
  }
  return key;
}

StatusOr<RankDigests> DigestsOf(const LoadedTable& loaded, const StepBinder& binder) {
  WEIGHTD_ASSIGN_OR_RETURN(const std::span<const uint64_t> words, loaded.words.Read());
  RankDigests digests;
  digests.tensors = binder.tensors();
  digests.words.assign(words.begin(), words.end());
  return digests;
}

}  // namespace

StatusOr<std::unique_ptr<IpcTransport>> IpcTransport::Create(cuda::DeviceId device,
                                                             const IpcOptions& options) {
  std::unique_ptr<IpcTransport> transport(new IpcTransport(device, options));
  WEIGHTD_ASSIGN_OR_RETURN(transport->local_, Lane::Create(device));
  WEIGHTD_ASSIGN_OR_RETURN(transport->remote_, Lane::Create(device));
  WEIGHTD_ASSIGN_OR_RETURN(const int multiprocessors, cuda::NumMultiprocessors(device));
  transport->local_blocks_beside_ = kBlocksBeside * multiprocessors;
  return transport;
}

IpcTransport::~IpcTransport() = default;

/// A context that is lost stays lost: the process has to be replaced.
Status IpcTransport::Note(Status status) {
  const bool lost =
      status.code() == StatusCode::kUnavailable && FieldsOf(status).reason == reason::kDevice;
  broken_ = broken_ || lost;
  return status;
}

uint64_t IpcTransport::table_bytes() const {
  uint64_t bytes = 0;
  for (const LoadedTable& loaded : tables_) bytes += loaded.table.size_bytes();
  return bytes;
}

StatusOr<LoadedTable> IpcTransport::Load(StepTable step) {
  LoadedTable loaded;
  WEIGHTD_ASSIGN_OR_RETURN(loaded.table,
                           cuda::BoxTable::Create(step.image, device_, local_.stream()));
  WEIGHTD_RETURN_IF_ERROR(loaded.table.SetBases(step.ranges.bases(), local_.stream()));
  WEIGHTD_ASSIGN_OR_RETURN(loaded.words, cuda::DigestWords::Create(device_, step.image.num_words));
  loaded.windows = std::move(step.windows);
  loaded.bases = step.ranges.bases();
  // The upload is done before any lane may use it.
  WEIGHTD_RETURN_IF_ERROR(local_.Synchronize());
  return loaded;
}

StatusOr<LoadedTable*> IpcTransport::Find(std::vector<uint64_t> key, const StepBinder& binder,
                                          const BuildFn& build) {
  const auto known =
      key.empty() ? tables_.end()
                  : std::find_if(tables_.begin(), tables_.end(),
                                 [&key](const LoadedTable& loaded) { return loaded.key == key; });
  if (known != tables_.end()) {
    tables_.splice(tables_.begin(), tables_, known);
    return &tables_.front();
  }
  WEIGHTD_ASSIGN_OR_RETURN(StepTable step, build(binder));
  WEIGHTD_ASSIGN_OR_RETURN(LoadedTable loaded, Load(std::move(step)));
  loaded.key = std::move(key);
  tables_.push_front(std::move(loaded));
  return &tables_.front();
}

/// Before and after a step: tables of registrations and plans that are gone are the last in the
/// list, and go first.
void IpcTransport::MakeRoom() {
  std::erase_if(tables_, [](const LoadedTable& loaded) { return loaded.key.empty(); });
  while (tables_.size() > 1 && table_bytes() > options_.table_bytes) tables_.pop_back();
}

/// Runs the tables of each lane one after the other, the lanes side by side. What is launched
/// cannot be taken back and must not outlive the step, so neither deadline nor cancellation ends
/// the wait for it: the daemon ends a worker that hangs.
Status IpcTransport::Run(std::span<std::vector<TableRun>> lanes, RunControl& control) {
  uint32_t windows = 0;
  uint64_t bytes = 0;
  const auto advance = [&](TableRun& run) -> StatusOr<bool> {
    uint32_t landed = 0;
    WEIGHTD_ASSIGN_OR_RETURN(const bool moved,
                             run.Advance([&](const StepWindow& window, const std::string& next) {
                               bytes += window.bytes;
                               landed = window.landed;
                               if (control.on_window) control.on_window(++windows, bytes, next);
                             }));
    if (landed > 0 && control.on_landed) control.on_landed(run.binder().target_number(), landed);
    return moved;
  };
  const auto run = [&]() -> Status {
    std::vector<size_t> current(lanes.size());
    Clock::time_point spin_until = Clock::now() + kSpin;
    while (true) {
      bool left = false, moved = false;
      for (size_t i = 0; i < lanes.size(); ++i) {
        while (current[i] < lanes[i].size() && lanes[i][current[i]].finished()) ++current[i];
        if (current[i] == lanes[i].size()) continue;
        left = true;
        WEIGHTD_ASSIGN_OR_RETURN(const bool advanced, advance(lanes[i][current[i]]));
        moved = moved || advanced;
      }
      if (!left) return absl::OkStatus();
      if (moved) spin_until = Clock::now() + kSpin;
      if (!moved && Clock::now() >= spin_until) std::this_thread::sleep_for(kNap);
    }
  };
  Status status = run();
  if (status.ok()) return status;
  // Nothing of this step may run on: its mappings are given up when this returns.
  const Status local = local_.Synchronize();
  const Status remote = remote_.Synchronize();
  if (!local.ok()) return Note(local);
  return Note(remote.ok() ? status : remote);
}

StatusOr<std::vector<RankDigests>> IpcTransport::TransferAll(const BoundPlan& plan,
                                                             std::span<const uint32_t> targets,
                                                             RunControl& control) {
  MakeRoom();
  const bool any_remote = std::any_of(targets.begin(), targets.end(),
                                      [&](uint32_t t) { return plan.targets[t].remote; });
  std::deque<StepBinder> binders;  // runs point into it
  std::vector<LoadedTable*> loaded;
  std::vector<TableRun> lanes[2];
  for (uint32_t target : targets) {
    const bool remote = plan.targets[target].remote;
    const bool copy_engine = options_.copy_engine == IpcOptions::CopyEngine::kAlways ||
                             (options_.copy_engine == IpcOptions::CopyEngine::kPeers && remote);
    StepBinder& binder = binders.emplace_back(plan, control, "transfer");
    binder.SetTarget(target);
    WEIGHTD_RETURN_IF_ERROR(binder.Check(""));
    const StatusOr<LoadedTable*> found =
        Find(KeyOf(plan, target, kTransfer), binder,
             [&](const StepBinder& bound) { return BuildTransferTable(plan, bound, copy_engine); });
    if (!found.ok()) return binder.Fail(Note(found.status()), "");
    loaded.push_back(*found);
    const int local_blocks = any_remote ? local_blocks_beside_ : 0;
    lanes[remote ? 1 : 0].emplace_back(*found, &binder, remote ? &remote_ : &local_,
                                       remote ? cuda::kRemoteBlocks : local_blocks,
                                       options_.group_bytes);
  }
  WEIGHTD_RETURN_IF_ERROR(Run(lanes, control));
  std::vector<RankDigests> digests;
  for (size_t i = 0; i < loaded.size(); ++i) {
    StatusOr<RankDigests> read = DigestsOf(*loaded[i], binders[i]);
    if (!read.ok()) return binders[i].Fail(read.status(), "");
    WEIGHTD_RETURN_IF_ERROR(binders[i].Check(""));
    digests.push_back(*std::move(read));
  }
  MakeRoom();
  return digests;
}

StatusOr<RankDigests> IpcTransport::Transfer(const BoundPlan& plan, size_t target,
                                             RunControl& control) {
  const auto number = static_cast<uint32_t>(target);
  WEIGHTD_ASSIGN_OR_RETURN(std::vector<RankDigests> digests,
                           TransferAll(plan, {&number, 1}, control));
  return std::move(digests.front());
}

StatusOr<RankDigests> IpcTransport::Verify(const BoundPlan& plan, size_t target,
                                           RunControl& control) {
  StepBinder binder(plan, control, "verify");
  binder.SetTarget(target);
  WEIGHTD_RETURN_IF_ERROR(binder.Check(""));
  MakeRoom();
  const StatusOr<LoadedTable*> loaded =
      Find(KeyOf(plan, target, kVerify), binder, &BuildVerifyTable);
  if (!loaded.ok()) return binder.Fail(Note(loaded.status()), "");
  std::vector<TableRun> lane;
  lane.emplace_back(*loaded, &binder, &local_, 0, options_.group_bytes);
  if (control.landed != nullptr) {
    lane.back().Follow(control.landed, control.beside_wire ? kBlocksBesideWire : 0);
  }
  WEIGHTD_RETURN_IF_ERROR(Run({&lane, 1}, control));
  StatusOr<RankDigests> digests = DigestsOf(**loaded, binder);
  if (!digests.ok()) return binder.Fail(digests.status(), "");
  WEIGHTD_RETURN_IF_ERROR(binder.Check(""));
  MakeRoom();
  return digests;
}

/// Runs a table that is not kept.
StatusOr<std::vector<uint64_t>> IpcTransport::RunOnce(StepTable step, const StepBinder& binder,
                                                      RunControl& control) {
  StatusOr<LoadedTable> loaded = Load(std::move(step));
  if (!loaded.ok()) return Note(loaded.status());
  std::vector<TableRun> lane;
  lane.emplace_back(&*loaded, &binder, &local_, 0, options_.group_bytes);
  WEIGHTD_RETURN_IF_ERROR(Run({&lane, 1}, control));
  WEIGHTD_ASSIGN_OR_RETURN(const std::span<const uint64_t> words, loaded->words.Read());
  return std::vector<uint64_t>(words.begin(), words.end());
}

Status IpcTransport::CopyParams(const BoundPlan& plan, size_t target, std::span<const Binding> from,
                                RunControl& control) {
  StepBinder binder(plan, control, "catch_up");
  binder.SetTarget(target);
  WEIGHTD_ASSIGN_OR_RETURN(StepTable copies, BuildParamCopyTable(binder, from));
  const auto sent = RunOnce(std::move(copies), binder, control);
  if (!sent.ok()) return binder.Fail(sent.status(), "");
  WEIGHTD_ASSIGN_OR_RETURN(StepTable params, BuildParamTable(binder));
  const auto landed = RunOnce(std::move(params), binder, control);
  if (!landed.ok()) return binder.Fail(landed.status(), "");
  const auto [differs, with] = std::mismatch(sent->begin(), sent->end(), landed->begin());
  if (differs == sent->end()) return absl::OkStatus();
  const auto index = static_cast<size_t>(differs - sent->begin());
  const std::string& name = binder.target().layout->params[index].name;
  return binder.Fail(Error(StatusCode::kDataLoss, reason::kVerifyMismatch, "sync the engine again",
                           "parameter differs from its peer's after the copy: param={}", name),
                     name);
}

StatusOr<uint64_t> IpcTransport::DigestShard(const BoundPlan& plan, uint32_t rank, uint32_t tensor,
                                             uint32_t shard, RunControl& control) {
  const StepBinder binder(plan, control, "prepare");
  const std::string& name = (*plan.table)[tensor].name;
  WEIGHTD_ASSIGN_OR_RETURN(StepTable step, BuildShardTable(plan, binder, rank, tensor, shard));
  const auto words = RunOnce(std::move(step), binder, control);
  if (!words.ok()) return binder.Fail(words.status(), name);
  return words->front();
}

}  // namespace weightd
