#include "daemon/transport/nccl/gpu_stage.h"

#include <algorithm>

#include "daemon/device/cuda/device.h"
#include "daemon/transport/ipc/ipc_transport.h"
#include "daemon/transport/ipc/step_table.h"
#include "daemon/transport/nccl/nccl_wire.h"

namespace weightd {
namespace {

/// Most device memory of tables kept for replay; larger ones are kept alone.
constexpr uint64_t kTableBytes = 24u << 20;

/// What the tables depend on; empty if the plan cannot be told from others.
std::vector<uint64_t> KeyOf(const BoundPlan& plan, const std::byte* ring) {
  std::vector<uint64_t> key;
  if (plan.id == 0) return key;
  key = {plan.id, reinterpret_cast<uintptr_t>(ring)};
  key.insert(key.end(), plan.registrations.begin(), plan.registrations.end());
  for (const BoundTarget& target : plan.targets) {
    key.push_back(target.registration);
    key.push_back(target.round);
  }
  return key;
}

}  // namespace

StatusOr<std::unique_ptr<GpuStage>> GpuStage::Create(cuda::DeviceId device) {
  std::unique_ptr<GpuStage> stage(new GpuStage(device));
  for (Lane* lane : {&stage->packing_, &stage->scattering_}) {
    WEIGHTD_ASSIGN_OR_RETURN(lane->stream, cuda::Stream::Create(device));
    for (cuda::Event& end : lane->ends) {
      WEIGHTD_ASSIGN_OR_RETURN(end, cuda::Event::Create(device));
    }
  }
  WEIGHTD_ASSIGN_OR_RETURN(const int multiprocessors, cuda::NumMultiprocessors(device));
  // Each block has a multiprocessor for itself, and NCCL's kernels, which run beside, have theirs.
  stage->blocks_ = std::max(multiprocessors - kMaxNcclCtas, 1);
  // Where bytes are scattered they are also verified meanwhile.
  stage->scatter_blocks_ = std::max(stage->blocks_ - kBlocksBesideWire, 1);
  return stage;
}

Status GpuStage::Reserve(uint64_t bytes) {
  if (bytes != 0 && bytes <= ring_.size_bytes()) return absl::OkStatus();
  ring_ = cuda::DeviceBuffer();
  tables_.clear();
  if (bytes == 0) return absl::OkStatus();
  WEIGHTD_ASSIGN_OR_RETURN(const uint64_t free, cuda::FreeBytes(device_));
  if (free >= bytes) {
    StatusOr<cuda::DeviceBuffer> ring = cuda::DeviceBuffer::Create(device_, bytes);
    if (ring.ok()) {
      ring_ = *std::move(ring);
      return absl::OkStatus();
    }
    if (ring.status().code() != StatusCode::kResourceExhausted) return ring.status();
  }
  return Error(StatusCode::kResourceExhausted, reason::kGpuMemory,
               "leave the GPU more memory (e.g. vLLM's gpu_memory_utilization), or lower "
               "worker.wire_bytes",
               "no memory for the staging of a wire: needed={} bytes free={} bytes", bytes, free);
}

Status GpuStage::Begin(const BoundPlan& plan, const WireSchedule& schedule, RunControl&) {
  std::vector<uint64_t> key = KeyOf(plan, ring());
  const auto known = std::find_if(tables_.begin(), tables_.end(), [&](const Tables& tables) {
    return !key.empty() && tables.key == key;
  });
  if (known != tables_.end()) {
    tables_.splice(tables_.begin(), tables_, known);
  } else {
    WEIGHTD_ASSIGN_OR_RETURN(Tables tables, Load(plan, schedule));
    tables.key = std::move(key);
    tables_.push_front(std::move(tables));
    uint64_t bytes = 0;
    for (const Tables& kept : tables_) bytes += kept.size_bytes();
    while (tables_.size() > 1 && bytes > kTableBytes) {
      bytes -= tables_.back().size_bytes();
      tables_.pop_back();
    }
  }
  packing_.Begin(&tables_.front().pack);
  scattering_.Begin(&tables_.front().scatter);
  return absl::OkStatus();
}

StatusOr<GpuStage::Tables> GpuStage::Load(const BoundPlan& plan, const WireSchedule& schedule) {
  const WireBinder binder(plan, schedule, ring());
  Tables tables;
  WEIGHTD_ASSIGN_OR_RETURN(
      tables.pack, LoadSide(plan, schedule.sends, schedule.num_turns, binder.num_words(),
                            [&](uint32_t i, uint32_t turn) { return binder.BindPack(i, turn); }));
  WEIGHTD_ASSIGN_OR_RETURN(tables.scatter, LoadSide(plan, schedule.receives, schedule.num_turns, 0,
                                                    [&](uint32_t i, uint32_t turn) {
                                                      return binder.BindScatter(i, turn);
                                                    }));
  return tables;
}

StatusOr<GpuStage::Table> GpuStage::LoadSide(const BoundPlan& plan, const WireSide& side,
                                             uint32_t num_turns, size_t num_words,
                                             const BindFn& bind) {
  RangeList ranges;
  Binding staging;
  staging.segment = ring();
  staging.segment_bytes = ring_bytes();
  ranges.Add(staging);
  for (const std::vector<Binding>& rank : plan.sources) {
    for (const Binding& binding : rank) ranges.Add(binding);
  }
  for (const BoundTarget& target : plan.targets) {
    for (const Binding& binding : target.params) ranges.Add(binding);
  }
  const bool digests = num_words > 0;
  const auto words = static_cast<uint32_t>(std::max<size_t>(num_words, 1));
  cuda::BoxTableBuilder builder(ranges.sizes(), words);
  for (uint32_t turn = 0; turn < num_turns; ++turn) {
    for (uint32_t i = side.copy_begin(turn); i < side.copy_end[turn]; ++i) {
      WEIGHTD_ASSIGN_OR_RETURN(const BlockItem item, bind(i, turn));
      WEIGHTD_RETURN_IF_ERROR(builder.AddCopy(
          ranges.Locate(item.from.base, item.from.dtype, item.from.extent, item.from.strides),
          ranges.Locate(item.to.base, item.to.dtype, item.to.extent, item.to.strides),
          digests ? &item.position : nullptr, static_cast<uint32_t>(item.word)));
    }
    builder.EndWindow();
  }
  const cuda::StreamRef stream = packing_.stream.ref();
  Table table;
  WEIGHTD_ASSIGN_OR_RETURN(table.boxes,
                           cuda::BoxTable::Create(std::move(builder).Finish(), device_, stream));
  WEIGHTD_RETURN_IF_ERROR(table.boxes.SetBases(ranges.bases(), stream));
  WEIGHTD_ASSIGN_OR_RETURN(table.words, cuda::DigestWords::Create(device_, words));
  // The upload is done before either lane may use it.
  WEIGHTD_RETURN_IF_ERROR(packing_.stream.Synchronize());
  return table;
}

void GpuStage::Lane::Begin(Table* next) {
  table = next;
  launched = done = 0;
}

Status GpuStage::Lane::Launch(uint32_t turn, int blocks) {
  if (turn == 0) WEIGHTD_RETURN_IF_ERROR(table->words.Clear(stream.ref()));
  WEIGHTD_RETURN_IF_ERROR(
      cuda::Launch(table->boxes, turn, turn + 1, table->words, blocks, stream.ref()));
  WEIGHTD_RETURN_IF_ERROR(ends[turn % kWireSlots].Record(stream.ref()));
  launched = turn + 1;
  return absl::OkStatus();
}

StatusOr<uint32_t> GpuStage::Lane::Done() {
  while (done < launched) {
    WEIGHTD_ASSIGN_OR_RETURN(const bool ended, ends[done % kWireSlots].Done());
    if (!ended) break;
    ++done;
  }
  return done;
}

/// The words of all launches; an error if a kernel refused a box.
StatusOr<std::vector<uint64_t>> GpuStage::Lane::Read() {
  WEIGHTD_RETURN_IF_ERROR(table->words.Fetch(stream.ref()));
  WEIGHTD_RETURN_IF_ERROR(stream.Synchronize());
  WEIGHTD_ASSIGN_OR_RETURN(const std::span<const uint64_t> read, table->words.Read());
  return std::vector<uint64_t>(read.begin(), read.end());
}

StatusOr<std::vector<uint64_t>> GpuStage::Words() {
  WEIGHTD_RETURN_IF_ERROR(scattering_.Read().status());
  return packing_.Read();
}

Status GpuStage::Drain() {
  const Status packed = packing_.stream.Synchronize();
  const Status scattered = scattering_.stream.Synchronize();
  return packed.ok() ? scattered : packed;
}

}  // namespace weightd
