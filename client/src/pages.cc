#include "client/src/pages.h"

#include <algorithm>

#include "daemon/base/version.h"
#include "daemon/layout/stages.h"
#include "daemon/wire/convert.h"

namespace weightd {
namespace {

/// Bytes of content after which a page is closed; leaves room for one more item and the envelope.
constexpr size_t kFullBytes = kPageBytes * 3 / 4;
/// Most bytes of a number that counts boxes on the wire.
constexpr size_t kIndexBytes = 5;

template <typename Page>
class Pager {
 public:
  /// The page that takes an item of `bytes`.
  Page& For(size_t bytes) {
    if (pages_.empty() || filled_ + bytes > kFullBytes) {
      pages_.emplace_back();
      filled_ = 0;
    }
    filled_ += bytes;
    return pages_.back();
  }

  std::vector<Page> Take() { return std::move(pages_); }

  /// Marks the last page, which is made if there is none.
  std::vector<Page> TakeLast() {
    For(0).set_last(true);
    return std::move(pages_);
  }

 private:
  std::vector<Page> pages_;
  size_t filled_ = 0;
};

v1::MemoryBinding Binding(const Placement& placement, const Dims& extent, DType dtype) {
  v1::MemoryBinding binding;
  binding.set_segment(placement.segment.value_or(0));
  binding.set_staged(!placement.segment.has_value());
  if (placement.segment.has_value()) {
    binding.set_offset_bytes(placement.offset_bytes);
    for (int64_t stride : placement.strides) binding.add_strides(stride);
  }
  for (int64_t size : extent) binding.add_extent(size);
  binding.set_dtype(static_cast<v1::DType>(dtype));
  return binding;
}

}  // namespace

std::vector<v1::ShardsPage> ShardsPages(const RankShards& shards) {
  Pager<v1::ShardsPage> pager;
  size_t num_sent = 0;
  for (size_t t = 0; t + 1 < shards.first.size(); ++t) {
    const auto begin = shards.box_index.begin() + shards.first[t];
    const auto end = shards.box_index.begin() + shards.first[t + 1];
    for (auto index = begin; index != end; ++index) {
      for (; num_sent <= *index; ++num_sent) {
        v1::Box box = ToProto(shards.boxes[num_sent]);
        *pager.For(box.ByteSizeLong() + kIndexBytes).add_boxes() = std::move(box);
      }
    }
    const auto count = static_cast<size_t>(end - begin);
    v1::ShardsPage& page = pager.For((count + 1) * kIndexBytes);
    page.add_boxes_per_tensor(static_cast<uint32_t>(count));
    page.mutable_box_index()->Add(begin, end);
  }
  return pager.TakeLast();
}

std::vector<v1::TensorTablePage> TablePages(const TensorTable& table) {
  Pager<v1::TensorTablePage> pager;
  for (const TensorInfo& tensor : table) {
    v1::TensorSpec spec = ToProto(tensor);
    *pager.For(spec.ByteSizeLong() + kIndexBytes).add_tensors() = std::move(spec);
  }
  return pager.TakeLast();
}

std::vector<v1::ParamsPage> ParamsPages(const std::vector<ParamInfo>& params) {
  Pager<v1::ParamsPage> pager;
  for (const ParamInfo& param : params) {
    v1::ParamSpec spec = ToProto(param);
    *pager.For(spec.ByteSizeLong() + kIndexBytes).add_params() = std::move(spec);
  }
  return pager.Take();
}

std::vector<v1::TracePage> TracePages(const TracedLayout& trace) {
  Pager<v1::TracePage> pager;
  for (const TracedSource& source : trace.sources()) {
    v1::TracedSource item;
    item.set_name(source.name);
    for (int64_t size : source.shape) item.add_shape(size);
    *pager.For(item.ByteSizeLong() + kIndexBytes).add_sources() = std::move(item);
  }
  for (const Write& write : trace.writes()) {
    v1::WriteSpec spec = ToProto(write);
    *pager.For(spec.ByteSizeLong() + kIndexBytes).add_writes() = std::move(spec);
  }
  return pager.Take();
}

std::vector<v1::BindMemory> ActorBindings(const ActorRegistration& registration) {
  Pager<v1::BindMemory> pager;
  const RankShards& shards = registration.shards;
  for (uint32_t t = 0; t < registration.table.size(); ++t) {
    for (uint32_t i = shards.first[t]; i < shards.first[t + 1]; ++i) {
      v1::MemoryBinding binding =
          Binding(registration.memory[i], shards.boxes[shards.box_index[i]].extent,
                  registration.table[t].dtype);
      binding.set_index(t);
      binding.set_box(i - shards.first[t]);
      *pager.For(binding.ByteSizeLong() + kIndexBytes).add_bindings() = std::move(binding);
    }
  }
  return pager.TakeLast();
}

std::vector<v1::BindMemory> EngineBindings(const EngineRegistration& registration) {
  Pager<v1::BindMemory> pager;
  uint32_t index = 0;
  for (size_t p = 0; p < registration.params.size(); ++p) {
    for (const ParamInfo& part : PartsOf(registration.params[p])) {
      const uint32_t own = index++;
      if (!registration.memory[p].segment.has_value()) continue;
      v1::MemoryBinding binding = Binding(registration.memory[p], part.shape, part.dtype);
      binding.set_index(own);
      *pager.For(binding.ByteSizeLong() + kIndexBytes).add_bindings() = std::move(binding);
    }
  }
  return pager.TakeLast();
}

namespace {

/// Adds segments and descriptors to frames, a new one when the last is full.
class FrameList {
 public:
  v1::Segment* AddSegment(uint32_t id, uint64_t size_bytes) {
    if (frames_.empty() || frames_.back().fds.size() == kMaxFrameFds ||
        frames_.back().offer.segments_size() == kMaxFrameSegments) {
      frames_.emplace_back();
    }
    v1::Segment* segment = frames_.back().offer.add_segments();
    segment->set_id(id);
    segment->set_size_bytes(size_bytes);
    return segment;
  }
  bool full() const { return frames_.back().fds.size() == kMaxFrameFds; }
  void AddFd(int fd) { frames_.back().fds.push_back(fd); }
  std::vector<SegmentFrame> Take() { return std::move(frames_); }

 private:
  static constexpr int kMaxFrameSegments = 4096;  // about half a megabyte
  std::vector<SegmentFrame> frames_;
};

void AddCudaSegment(const CudaSegment& segment, uint32_t id, FrameList* frames) {
  const bool whole = segment.pieces.empty();
  const auto begin = [&] {
    v1::Segment* entry = frames->AddSegment(id, segment.size_bytes);
    entry->set_kind(whole ? v1::SEGMENT_KIND_CUDA_IPC : v1::SEGMENT_KIND_CUDA_VMM);
    entry->set_device(segment.device);
    return entry;
  };
  v1::Segment* entry = begin();
  if (whole) {
    entry->set_ipc_handle(segment.handle.bytes.data(), segment.handle.bytes.size());
    entry->set_allocation(segment.allocation);
  }
  for (const CudaPiece& piece : segment.pieces) {
    if (frames->full()) entry = begin();
    entry->add_piece_bytes(piece.size_bytes);
    frames->AddFd(piece.fd.get());
  }
}

}  // namespace

std::vector<SegmentFrame> SegmentFrames(const SegmentSet& segments, const std::string& event) {
  FrameList frames;
  uint32_t id = 0;
  for (const Segment& segment : segments.segments()) {
    frames.AddSegment(id++, segment.size_bytes)->set_kind(v1::SEGMENT_KIND_SHARED_MEMORY);
    frames.AddFd(segment.fd.get());
  }
  for (const CudaSegment& segment : segments.cuda().segments()) {
    AddCudaSegment(segment, id++, &frames);
  }
  std::vector<SegmentFrame> list = frames.Take();
  if (!list.empty()) list.front().offer.set_event(event);
  return list;
}

}  // namespace weightd
