#include "daemon/worker/member_memory.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "daemon/device/mapping.h"

namespace weightd {
namespace {

constexpr char kUpgrade[] = "use the client library of this release";

auto Key(const MemoryBlock& block) { return std::pair(block.index, block.box); }

}  // namespace

const MemoryBlock* MemberMemory::Find(uint32_t index, uint32_t box) const {
  const std::pair<uint32_t, uint32_t> key(index, box);
  const auto it =
      std::lower_bound(blocks.begin(), blocks.end(), key,
                       [](const MemoryBlock& block, const auto& k) { return Key(block) < k; });
  return it != blocks.end() && Key(*it) == key ? &*it : nullptr;
}

Status MemberMemory::CheckIntact(bool sizes) const {
  for (const auto& [id, segment] : segments) {
    WEIGHTD_RETURN_IF_ERROR(segment->CheckIntact(sizes));
  }
  return absl::OkStatus();
}

/// Takes what belongs to one segment out of a frame.
StatusOr<SegmentOffer> MemoryRegistration::ReadOffer(const v1::Segment& segment,
                                                     std::vector<ScopedFd>* fds,
                                                     size_t* next_fd) const {
  SegmentOffer offer;
  offer.label = fmt::format("{} segment {}", label_, segment.id());
  offer.size_bytes = segment.size_bytes();
  offer.device = segment.device();
  offer.ipc_handle = segment.ipc_handle();
  offer.allocation = segment.allocation();
  offer.piece_bytes.assign(segment.piece_bytes().begin(), segment.piece_bytes().end());
  offer.writable = writable_;
  size_t num_fds = 1;
  if (segment.kind() == v1::SEGMENT_KIND_CUDA_IPC) {
    offer.kind = SegmentOffer::Kind::kCudaIpc;
    num_fds = 0;
  } else if (segment.kind() == v1::SEGMENT_KIND_CUDA_VMM) {
    offer.kind = SegmentOffer::Kind::kCudaVmm;
    num_fds = offer.piece_bytes.size();
  }
  if (num_fds > fds->size() - *next_fd) {
    return Error(StatusCode::kInvalidArgument, reason::kProtocol, kUpgrade,
                 "offer lacks descriptors: {} needed={} left={}", offer.label, num_fds,
                 fds->size() - *next_fd);
  }
  for (size_t i = 0; i < num_fds; ++i) offer.fds.push_back(std::move((*fds)[(*next_fd)++]));
  return offer;
}

Status MemoryRegistration::Offer(const v1::OfferSegments& offer, std::vector<ScopedFd> fds) {
  size_t next_fd = 0;
  for (const v1::Segment& segment : offer.segments()) {
    WEIGHTD_ASSIGN_OR_RETURN(SegmentOffer read, ReadOffer(segment, &fds, &next_fd));
    std::shared_ptr<LentSegment>& slot = segments_[segment.id()];
    WEIGHTD_ASSIGN_OR_RETURN(slot, mapper_->Map(std::move(read), slot));
  }
  if (next_fd != fds.size()) {
    return Error(StatusCode::kInvalidArgument, reason::kProtocol, kUpgrade,
                 "offer carries {} descriptors, of which {} belong to segments", fds.size(),
                 next_fd);
  }
  if (!offer.event().empty()) {
    WEIGHTD_ASSIGN_OR_RETURN(fence_, mapper_->OpenFence(offer.event(), label_));
  }
  return absl::OkStatus();
}

void MemoryRegistration::Abandon() {
  pending_ = nullptr;
  std::erase_if(segments_, [](const auto& entry) {
    return entry.second == nullptr || !entry.second->complete();
  });
}

StatusOr<MemoryBlock> MemoryRegistration::CheckBinding(const v1::MemoryBinding& binding) {
  MemoryBlock block;
  block.index = binding.index();
  block.box = binding.box();
  if (binding.dtype() <= 0 || binding.dtype() >= kNumDTypes) {
    return Error(StatusCode::kInvalidArgument, reason::kDtype, kUpgrade, "unknown dtype: dtype={}",
                 static_cast<int>(binding.dtype()));
  }
  block.dtype = static_cast<DType>(binding.dtype());
  const std::span<const int64_t> extent(binding.extent().data(),
                                        static_cast<size_t>(binding.extent_size()));
  if (!ValidShape(extent) ||
      (binding.strides_size() != 0 && binding.strides_size() != binding.extent_size())) {
    return Error(StatusCode::kInvalidArgument, reason::kShape, kUpgrade,
                 "extent or strides cannot be used: extent=[{}] strides=[{}]",
                 fmt::join(binding.extent(), ", "), fmt::join(binding.strides(), ", "));
  }
  block.extent = Dims(extent);
  block.binding.staged = binding.staged();
  if (binding.staged() || NumElements(block.extent) == 0) {
    block.binding.strides = RowMajorStrides(block.extent);
    return block;
  }
  block.binding.strides =
      binding.strides_size() == 0
          ? RowMajorStrides(block.extent)
          : Dims(std::span<const int64_t>(binding.strides().data(), extent.size()));
  const auto segment = segments_.find(binding.segment());
  if (segment == segments_.end() || segment->second == nullptr || !segment->second->complete()) {
    return Error(StatusCode::kInvalidArgument, reason::kMemoryMoved,
                 "offer every segment before binding memory in it",
                 "binding names a segment that was not offered: segment={}", binding.segment());
  }
  const LentSegment& lent = *segment->second;
  WEIGHTD_RETURN_IF_ERROR(CheckBlockInside(lent.size_bytes(), binding.offset_bytes(), block.extent,
                                           block.binding.strides, SizeBytes(block.dtype),
                                           writable_));
  if (binding.offset_bytes() % SizeBytes(block.dtype) != 0) {
    return Error(StatusCode::kInvalidArgument, reason::kMemoryMoved,
                 "align the memory to the size of its elements, or have it staged",
                 "block is not aligned to its dtype: offset_bytes={} dtype={}",
                 binding.offset_bytes(), Name(block.dtype));
  }
  block.binding.base = lent.data() + binding.offset_bytes();
  block.binding.segment = lent.data();
  block.binding.segment_bytes = lent.size_bytes();
  pending_->segments.insert(*segment);
  return block;
}

StatusOr<std::shared_ptr<const MemberMemory>> MemoryRegistration::Bind(const v1::BindMemory& page) {
  if (pending_ == nullptr) pending_ = std::make_shared<MemberMemory>();
  for (const v1::MemoryBinding& binding : page.bindings()) {
    StatusOr<MemoryBlock> block = CheckBinding(binding);
    if (block.ok() && pending_->blocks.size() >= kMaxBindings) {
      block = Error(StatusCode::kResourceExhausted, reason::kMessageTooLarge,
                    "register fewer, larger tensors", "too many bindings: limit={}", kMaxBindings);
    }
    if (!block.ok()) {
      pending_ = nullptr;
      return WithTensor(block.status(),
                        fmt::format("index {} box {}", binding.index(), binding.box()));
    }
    pending_->has_staged |= block->binding.staged;
    pending_->blocks.push_back(*std::move(block));
  }
  if (!page.last()) return std::shared_ptr<const MemberMemory>();
  return Finish();
}

StatusOr<std::shared_ptr<const MemberMemory>> MemoryRegistration::Finish() {
  const std::shared_ptr<MemberMemory> memory = std::exchange(pending_, nullptr);
  const auto by_key = [](const MemoryBlock& a, const MemoryBlock& b) { return Key(a) < Key(b); };
  if (!std::is_sorted(memory->blocks.begin(), memory->blocks.end(), by_key)) {
    std::sort(memory->blocks.begin(), memory->blocks.end(), by_key);
  }
  const auto twice =
      std::adjacent_find(memory->blocks.begin(), memory->blocks.end(),
                         [](const auto& a, const auto& b) { return Key(a) == Key(b); });
  if (twice != memory->blocks.end()) {
    return WithTensor(
        Error(StatusCode::kInvalidArgument, reason::kDuplicateTensor, "bind each box once",
              "memory is bound twice: index={} box={}", twice->index, twice->box),
        fmt::format("index {} box {}", twice->index, twice->box));
  }
  segments_ = memory->segments;
  memory->fence = fence_;
  static std::atomic<uint64_t> last_id{0};
  memory->id = ++last_id;
  for (const auto& [id, segment] : segments_) memory->mapped_bytes += segment->size_bytes();
  return std::shared_ptr<const MemberMemory>(memory);
}

}  // namespace weightd
