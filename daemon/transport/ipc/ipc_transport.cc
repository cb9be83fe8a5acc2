#include "daemon/transport/ipc/ipc_transport.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "daemon/device/cuda/pitched_copy.h"

namespace weightd {
namespace {

constexpr uint64_t kTransfer = 1;
constexpr uint64_t kVerify = 2;

/// A wait begins by spinning, since most steps of small models end within it, then sleeps.
constexpr microseconds kSpin{500};
constexpr microseconds kNap{20};

/// What a table depends on; empty if the plan cannot be told from others.
std::vector<uint64_t> KeyOf(const BoundPlan& plan, size_t target, uint64_t kind) {
  std::vector<uint64_t> key;
  if (plan.id == 0) return key;
  key = {kind, plan.id, target, plan.targets[target].registration};
  if (kind == kTransfer) {
    key.insert(key.end(), plan.registrations.begin(), plan.registrations.end());
  }
  return key;
}

}  // namespace

StatusOr<std::unique_ptr<IpcTransport>> IpcTransport::Create(cuda::DeviceId device,
                                                             const IpcOptions& options) {
  std::unique_ptr<IpcTransport> transport(new IpcTransport(device, options));
  WEIGHTD_ASSIGN_OR_RETURN(transport->stream_, cuda::Stream::Create(device, true));
  WEIGHTD_ASSIGN_OR_RETURN(transport->copy_stream_, cuda::Stream::Create(device, true));
  WEIGHTD_ASSIGN_OR_RETURN(transport->copied_, cuda::Event::Create(device));
  for (cuda::Event& event : transport->events_) {
    WEIGHTD_ASSIGN_OR_RETURN(event, cuda::Event::Create(device));
  }
  WEIGHTD_ASSIGN_OR_RETURN(transport->local_blocks_, cuda::DefaultBlocks(device));
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
  for (const Loaded& loaded : tables_) bytes += loaded.table.size_bytes();
  return bytes;
}

void IpcTransport::MakeRoom() {
  while (tables_.size() > 1 && table_bytes() > options_.table_bytes) tables_.pop_back();
}

StatusOr<IpcTransport::Loaded> IpcTransport::Load(StepTable step) {
  Loaded loaded;
  WEIGHTD_ASSIGN_OR_RETURN(loaded.table,
                           cuda::BoxTable::Create(step.image, device_, stream_.ref()));
  WEIGHTD_RETURN_IF_ERROR(loaded.table.SetBases(step.ranges.bases(), stream_.ref()));
  WEIGHTD_ASSIGN_OR_RETURN(loaded.words, cuda::DigestWords::Create(device_, step.image.num_words));
  loaded.windows = std::move(step.windows);
  loaded.bases = step.ranges.bases();
  return loaded;
}

StatusOr<IpcTransport::Loaded*> IpcTransport::Find(std::vector<uint64_t> key,
                                                   const StepBinder& binder, const BuildFn& build) {
  const auto known = key.empty()
                         ? tables_.end()
                         : std::find_if(tables_.begin(), tables_.end(),
                                        [&key](const Loaded& loaded) { return loaded.key == key; });
  if (known != tables_.end()) {
    tables_.splice(tables_.begin(), tables_, known);
    return &tables_.front();
  }
  // Tables of registrations and plans that are gone are the last in the list, and go first.
  std::erase_if(tables_, [](const Loaded& loaded) { return loaded.key.empty(); });
  WEIGHTD_ASSIGN_OR_RETURN(StepTable step, build(binder));
  WEIGHTD_ASSIGN_OR_RETURN(Loaded loaded, Load(std::move(step)));
  loaded.key = std::move(key);
  tables_.push_front(std::move(loaded));
  MakeRoom();
  return &tables_.front();
}

/// Waits for the GPU. What is launched cannot be taken back and must not outlive the step, so
/// neither deadline nor cancellation ends this wait: the daemon ends a worker that hangs.
Status IpcTransport::Await(const cuda::Event& event) {
  const Clock::time_point spin_until = Clock::now() + kSpin;
  while (true) {
    WEIGHTD_ASSIGN_OR_RETURN(const bool done, event.Done());
    if (done) return absl::OkStatus();
    if (Clock::now() >= spin_until) std::this_thread::sleep_for(kNap);
  }
}

/// Launches the windows [first, end): kernels on one stream, the copy engine on another, which the
/// first then waits for.
Status IpcTransport::LaunchGroup(Loaded* loaded, uint32_t first, uint32_t end, bool remote) {
  bool copies = false;
  for (uint32_t w = first; w < end; ++w) {
    for (const EngineCopy& copy : loaded->windows[w].copies) {
      copies = true;
      WEIGHTD_RETURN_IF_ERROR(cuda::CopyPitched(
          copy.shape, loaded->bases[copy.from_range] + copy.from_offset,
          loaded->bases[copy.to_range] + copy.to_offset, device_, copy_stream_.ref()));
    }
  }
  WEIGHTD_RETURN_IF_ERROR(cuda::Launch(loaded->table, first, end, loaded->words,
                                       remote ? cuda::kRemoteBlocks : local_blocks_,
                                       stream_.ref()));
  if (!copies) return absl::OkStatus();
  WEIGHTD_RETURN_IF_ERROR(copied_.Record(copy_stream_.ref()));
  return stream_.Wait(copied_.ref());
}

Status IpcTransport::RunGroups(Loaded* loaded, const StepBinder& binder, bool remote) {
  const std::vector<StepWindow>& windows = loaded->windows;
  const auto end = static_cast<uint32_t>(windows.size());
  const auto name_at = [&](uint32_t window) {
    return window < end ? binder.ParamAt(windows[window].first) : std::string();
  };
  uint64_t bytes = 0;
  uint32_t reported = 0;
  const auto report_until = [&](uint32_t limit) {
    while (reported < limit) {
      bytes += windows[reported++].bytes;
      binder.Report(reported, bytes, name_at(reported));
    }
  };
  uint32_t launched = 0;  // windows
  uint32_t group_end[2] = {0, 0};
  uint32_t groups = 0;
  for (uint32_t group = 0; launched < end; ++group, ++groups) {
    WEIGHTD_RETURN_IF_ERROR(binder.Check(name_at(launched)));
    const uint32_t first = launched;
    uint64_t group_bytes = 0;
    while (launched < end && (group_bytes == 0 || group_bytes < options_.group_bytes)) {
      group_bytes += windows[launched++].bytes;
    }
    WEIGHTD_RETURN_IF_ERROR(LaunchGroup(loaded, first, launched, remote));
    WEIGHTD_RETURN_IF_ERROR(events_[group % 2].Record(stream_.ref()));
    group_end[group % 2] = launched;
    if (group == 0) continue;
    WEIGHTD_RETURN_IF_ERROR(Await(events_[(group + 1) % 2]));
    report_until(group_end[(group + 1) % 2]);
  }
  const uint32_t last = groups == 0 ? 0 : (groups - 1) % 2;
  WEIGHTD_RETURN_IF_ERROR(Await(events_[last]));
  report_until(end);
  return binder.Check("");
}

/// Runs `launch` on a table and takes its digest words.
StatusOr<std::vector<uint64_t>> IpcTransport::Run(Loaded* loaded,
                                                  const std::function<Status()>& launch) {
  const auto run = [&]() -> Status {
    WEIGHTD_RETURN_IF_ERROR(loaded->words.Clear(stream_.ref()));
    WEIGHTD_RETURN_IF_ERROR(launch());
    WEIGHTD_RETURN_IF_ERROR(loaded->words.Fetch(stream_.ref()));
    WEIGHTD_RETURN_IF_ERROR(events_[0].Record(stream_.ref()));
    return Await(events_[0]);
  };
  Status status = run();
  if (!status.ok()) {
    // Nothing of this step may run on: its mappings are given up when this returns.
    const Status copied = copy_stream_.Synchronize();
    const Status drained = stream_.Synchronize();
    if (!copied.ok()) return copied;
    return drained.ok() ? status : drained;
  }
  WEIGHTD_ASSIGN_OR_RETURN(const std::span<const uint64_t> words, loaded->words.Read());
  return std::vector<uint64_t>(words.begin(), words.end());
}

StatusOr<RankDigests> IpcTransport::RunTarget(const BoundPlan& plan, size_t target,
                                              RunControl& control, std::string_view phase,
                                              uint64_t kind, const BuildFn& build) {
  StepBinder binder(plan, control, phase);
  binder.SetTarget(target);
  WEIGHTD_RETURN_IF_ERROR(binder.Check(""));
  StatusOr<Loaded*> loaded = Find(KeyOf(plan, target, kind), binder, build);
  if (!loaded.ok()) return binder.Fail(Note(loaded.status()), "");
  const bool remote = kind == kTransfer && plan.targets[target].remote;
  StatusOr<std::vector<uint64_t>> words =
      Run(*loaded, [&] { return RunGroups(*loaded, binder, remote); });
  if (!words.ok()) return binder.Fail(Note(words.status()), "");
  RankDigests digests;
  digests.tensors = binder.tensors();
  digests.words = *std::move(words);
  return digests;
}

StatusOr<RankDigests> IpcTransport::Transfer(const BoundPlan& plan, size_t target,
                                             RunControl& control) {
  const bool copy_engine =
      options_.copy_engine == IpcOptions::CopyEngine::kAlways ||
      (options_.copy_engine == IpcOptions::CopyEngine::kPeers && plan.targets[target].remote);
  return RunTarget(plan, target, control, "transfer", kTransfer, [&](const StepBinder& binder) {
    return BuildTransferTable(plan, binder, copy_engine);
  });
}

StatusOr<RankDigests> IpcTransport::Verify(const BoundPlan& plan, size_t target,
                                           RunControl& control) {
  return RunTarget(plan, target, control, "verify", kVerify, &BuildVerifyTable);
}

Status IpcTransport::CopyParams(const BoundPlan& plan, size_t target, std::span<const Binding> from,
                                RunControl& control) {
  StepBinder binder(plan, control, "catch_up");
  binder.SetTarget(target);
  const auto run = [&](StatusOr<StepTable> step) -> StatusOr<std::vector<uint64_t>> {
    WEIGHTD_RETURN_IF_ERROR(step.status());
    WEIGHTD_ASSIGN_OR_RETURN(Loaded loaded, Load(*std::move(step)));
    return Run(&loaded, [&] { return RunGroups(&loaded, binder, false); });
  };
  const StatusOr<std::vector<uint64_t>> sent = run(BuildParamCopyTable(binder, from));
  if (!sent.ok()) return binder.Fail(Note(sent.status()), "");
  const StatusOr<std::vector<uint64_t>> landed = run(BuildParamTable(binder));
  if (!landed.ok()) return binder.Fail(Note(landed.status()), "");
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
  WEIGHTD_RETURN_IF_ERROR(binder.Check(name));
  WEIGHTD_ASSIGN_OR_RETURN(StepTable step, BuildShardTable(plan, binder, rank, tensor, shard));
  StatusOr<Loaded> loaded = Load(std::move(step));
  if (!loaded.ok()) return binder.Fail(Note(loaded.status()), name);
  StatusOr<std::vector<uint64_t>> words = Run(&*loaded, [&] {
    return cuda::Launch(loaded->table, 0, loaded->table.num_windows(), loaded->words, local_blocks_,
                        stream_.ref());
  });
  if (!words.ok()) return binder.Fail(Note(words.status()), name);
  return (*words)[0];
}

}  // namespace weightd
