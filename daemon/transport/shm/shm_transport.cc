#include "daemon/transport/shm/shm_transport.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "daemon/device/host/box_copy.h"
#include "daemon/device/host/digest.h"
#include "daemon/transport/shm/mutate.h"
#include "daemon/transport/step_binder.h"

namespace weightd {
namespace {

constexpr int kMaxDefaultThreads = 8;
// What one thread takes at a time: large beside a wake-up, small beside a window.
constexpr int64_t kPartBytes = 1 << 20;
// Less than this is not worth waking a thread for.
constexpr int64_t kInlineBytes = 128 << 10;
// From here on a target leaves the caches before anyone reads it, so it is written around them.
constexpr uint64_t kStreamBytes = 16 << 20;
// Verify's windows, for cancellation and progress.
constexpr uint64_t kVerifyWindowBytes = 64 << 20;

int DefaultThreads() {
  cpu_set_t set;
  CPU_ZERO(&set);
  const int cores = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  return std::clamp(cores, 1, kMaxDefaultThreads);
}

uint64_t BytesOf(const Box& box, DType dtype) {
  return static_cast<uint64_t>(box.num_elements()) * SizeBytes(dtype);
}

}  // namespace

// One Transfer, Verify or DigestShard in progress.
class ShmTransport::Step {
 public:
  Step(ShmTransport& transport, const BoundPlan& plan, RunControl& control, std::string_view phase)
      : transport_(transport), plan_(plan), control_(control), binder_(plan, control, phase) {}

  StatusOr<RankDigests> Transfer(size_t target);
  StatusOr<RankDigests> Verify(size_t target);
  StatusOr<uint64_t> DigestShard(uint32_t rank, uint32_t tensor, uint32_t shard);

 private:
  void SetTarget(size_t target);
  Status AddCopy(const Copy& copy);
  Status AddStagedCopy(const Copy& copy);
  Status AddStaged(uint32_t rank, uint32_t tensor, uint32_t shard, const Box& box,
                   const std::function<void(const std::byte*, const Box&)>& use);
  void Add(const BlockItem& item);
  void RunItems();
  void RunItem(const BlockItem& item);
  RankDigests TakeDigests() const;

  ShmTransport& transport_;
  const BoundPlan& plan_;
  RunControl& control_;
  StepBinder binder_;

  bool copies_ = false;  // items are written, else only digested
  bool stream_ = false;
  std::vector<std::atomic<uint64_t>> words_;  // one per tensor, then the zero fill's
  std::vector<BlockItem> items_;              // of the current window
  int64_t item_bytes_ = 0;
};

void ShmTransport::Step::SetTarget(size_t target) {
  binder_.SetTarget(target);
  words_ = std::vector<std::atomic<uint64_t>>(binder_.num_words());
}

void ShmTransport::Step::Add(const BlockItem& item) {
  const host::Block& to = item.to;
  const Dims& extent = to.base != nullptr ? to.extent : item.from.extent;
  item_bytes_ += NumElements(extent) *
                 static_cast<int64_t>(std::max(SizeBytes(to.dtype), SizeBytes(item.from.dtype)));
  AppendParts(item, kPartBytes, items_);
}

void ShmTransport::Step::RunItem(const BlockItem& item) {
  const host::ConstBlock written{item.to.base, item.to.dtype, item.to.extent, item.to.strides};
  uint64_t word = 0;
  if (item.zero_fill) {
    if (copies_) {
      host::ZeroBlock(item.to);
      word = static_cast<uint64_t>(NumElements(item.to.extent));
    } else {
      word = host::ZeroFillWord(written, item.param);
    }
  } else if (copies_) {
    word = host::CopyBlock(transport_.kernels_, item.from, item.to,
                           transport_.digest_ ? &item.position : nullptr, stream_);
  } else {
    const bool read_target = item.to.base != nullptr;
    word = host::DigestBlock(transport_.kernels_, read_target ? written : item.from, item.position);
  }
  words_[item.word].fetch_add(word, std::memory_order_relaxed);
}

void ShmTransport::Step::RunItems() {
  if (copies_) MutateItems(items_);
  if (item_bytes_ < kInlineBytes) {
    for (const BlockItem& item : items_) RunItem(item);
  } else {
    transport_.pool_.ParallelFor(items_.size(), [this](size_t i) { RunItem(items_[i]); });
  }
  items_.clear();
  item_bytes_ = 0;
}

Status ShmTransport::Step::AddCopy(const Copy& copy) {
  WEIGHTD_ASSIGN_OR_RETURN(const BlockItem item, binder_.BindCopy(copy));
  const bool staged = !item.zero_fill && item.from.base == nullptr;  // see AddStagedCopy
  if (!staged) Add(item);
  return absl::OkStatus();
}

// Fetches `box` of a staged shard part by part and hands each to `use`, which must be done with it
// when it returns.
Status ShmTransport::Step::AddStaged(uint32_t rank, uint32_t tensor, uint32_t shard, const Box& box,
                                     const std::function<void(const std::byte*, const Box&)>& use) {
  const TensorInfo& info = (*plan_.table)[tensor];
  if (control_.staged == nullptr) {
    return binder_.Fail(
        Error(StatusCode::kFailedPrecondition, reason::kMemoryMoved,
              "pass the tensor to sync(tensors=...)",
              "shard has no memory and is not staged: tensor={}, rank={}", info.name, rank),
        info.name);
  }
  const auto max_elements =
      static_cast<int64_t>(control_.staged->max_part_bytes() / SizeBytes(info.dtype));
  const Box& held = binder_.Held(rank, tensor, shard);
  std::vector<Box> chunks;
  AppendChunks(box, max_elements, chunks);
  for (const Box& chunk : chunks) {
    WEIGHTD_RETURN_IF_ERROR(binder_.Check(info.name));
    Box part = chunk;
    for (int d = 0; d < part.num_dims(); ++d) part.origin[d] -= held.origin[d];
    StatusOr<const std::byte*> bytes = control_.staged->Fetch(rank, tensor, shard, part);
    if (!bytes.ok()) return binder_.Fail(std::move(bytes).status(), info.name);
    use(*bytes, chunk);
  }
  return absl::OkStatus();
}

Status ShmTransport::Step::AddStagedCopy(const Copy& copy) {
  const Write& write = binder_.target().layout->writes[copy.write];
  if (write.zero_fill || !binder_.Source(copy.source_rank, write.tensor, copy.shard).staged) {
    return absl::OkStatus();
  }
  WEIGHTD_ASSIGN_OR_RETURN(const BlockItem whole, binder_.Bind(write, copy.source, copy.target));
  const DType dtype = (*plan_.table)[write.tensor].dtype;
  const auto target_bytes = static_cast<int64_t>(SizeBytes(whole.to.dtype));
  return AddStaged(copy.source_rank, write.tensor, copy.shard, copy.source,
                   [&](const std::byte* bytes, const Box& chunk) {
                     BlockItem item = whole;
                     item.from = {bytes, dtype, chunk.extent, RowMajorStrides(chunk.extent)};
                     item.to.extent = chunk.extent;
                     for (int d = 0; d < chunk.num_dims(); ++d) {
                       item.to.base += (chunk.origin[d] - copy.source.origin[d]) *
                                       item.to.strides[d] * target_bytes;
                     }
                     item.position.origin = chunk.origin;
                     Add(item);
                     RunItems();
                   });
}

StatusOr<RankDigests> ShmTransport::Step::Transfer(size_t target) {
  SetTarget(target);
  copies_ = true;
  const RankPlan& rank_plan = *binder_.target().plan;
  stream_ = rank_plan.bytes >= kStreamBytes;
  const std::vector<uint32_t> landed = WritesLanded(rank_plan);
  uint64_t bytes = 0;
  for (size_t w = 0; w < rank_plan.windows.size(); ++w) {
    const Window& window = rank_plan.windows[w];
    WEIGHTD_RETURN_IF_ERROR(binder_.Check(binder_.FirstParam(w)));
    for (uint32_t i = window.begin; i < window.end; ++i) {
      WEIGHTD_RETURN_IF_ERROR(AddCopy(rank_plan.copies[i]));
    }
    RunItems();
    for (uint32_t i = window.begin; i < window.end; ++i) {
      WEIGHTD_RETURN_IF_ERROR(AddStagedCopy(rank_plan.copies[i]));
    }
    bytes += window.bytes;
    binder_.Report(static_cast<uint32_t>(w + 1), bytes, binder_.FirstParam(w + 1));
    if (control_.on_landed) control_.on_landed(static_cast<uint32_t>(target), landed[w]);
  }
  WEIGHTD_RETURN_IF_ERROR(binder_.Check(""));
  return TakeDigests();
}

StatusOr<RankDigests> ShmTransport::Step::Verify(size_t target) {
  SetTarget(target);
  const std::vector<Write>& writes = binder_.target().layout->writes;
  uint64_t bytes = 0, pending = 0;
  uint32_t windows = 0;
  for (size_t w = 0; w < writes.size(); ++w) {
    if (pending == 0) WEIGHTD_RETURN_IF_ERROR(binder_.Check(binder_.ParamAt(w)));
    WEIGHTD_RETURN_IF_ERROR(binder_.AwaitLanded(w + 1));
    WEIGHTD_ASSIGN_OR_RETURN(const BlockItem item, binder_.BindWrite(w));
    Add(item);
    pending += BytesOf(writes[w].target, item.to.dtype);
    if (pending < kVerifyWindowBytes && w + 1 < writes.size()) continue;
    RunItems();
    bytes += pending;
    pending = 0;
    binder_.Report(++windows, bytes, binder_.ParamAt(w + 1));
  }
  WEIGHTD_RETURN_IF_ERROR(binder_.Check(""));
  return TakeDigests();
}

StatusOr<uint64_t> ShmTransport::Step::DigestShard(uint32_t rank, uint32_t tensor, uint32_t shard) {
  words_ = std::vector<std::atomic<uint64_t>>(1);
  const TensorInfo& info = (*plan_.table)[tensor];
  const Box& held = binder_.Held(rank, tensor, shard);
  const Binding& binding = binder_.Source(rank, tensor, shard);
  WEIGHTD_RETURN_IF_ERROR(binder_.Check(info.name));
  BlockItem item;
  item.position = {tensor, info.shape, held.origin};
  if (binding.staged) {
    WEIGHTD_RETURN_IF_ERROR(
        AddStaged(rank, tensor, shard, held, [&](const std::byte* bytes, const Box& chunk) {
          item.from = {bytes, info.dtype, chunk.extent, RowMajorStrides(chunk.extent)};
          item.position.origin = chunk.origin;
          Add(item);
          RunItems();
        }));
  } else {
    if (binding.base == nullptr && !held.empty()) return binder_.NoMemory(info.name, rank);
    item.from = BindSource(binding, held, held, info.dtype);
    Add(item);
    RunItems();
  }
  WEIGHTD_RETURN_IF_ERROR(binder_.Check(info.name));
  return words_[0].load();
}

RankDigests ShmTransport::Step::TakeDigests() const {
  RankDigests digests;
  digests.tensors = binder_.tensors();
  digests.words.reserve(words_.size());
  for (const std::atomic<uint64_t>& word : words_) digests.words.push_back(word.load());
  MutateDigests(digests);
  return digests;
}

ShmTransport::ShmTransport(const ShmOptions& options)
    : kernels_(options.kernels != nullptr ? *options.kernels : host::BestKernels()),
      digest_(options.digest),
      pool_(options.num_threads > 0 ? options.num_threads : DefaultThreads()) {}

ShmTransport::~ShmTransport() = default;

StatusOr<RankDigests> ShmTransport::Transfer(const BoundPlan& plan, size_t target,
                                             RunControl& control) {
  return Step(*this, plan, control, "transfer").Transfer(target);
}

StatusOr<RankDigests> ShmTransport::Verify(const BoundPlan& plan, size_t target,
                                           RunControl& control) {
  return Step(*this, plan, control, "verify").Verify(target);
}

StatusOr<uint64_t> ShmTransport::DigestShard(const BoundPlan& plan, uint32_t rank, uint32_t tensor,
                                             uint32_t shard, RunControl& control) {
  return Step(*this, plan, control, "prepare").DigestShard(rank, tensor, shard);
}

}  // namespace weightd
