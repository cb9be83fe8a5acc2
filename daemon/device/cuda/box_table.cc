#include "daemon/device/cuda/box_table.h"

#include <algorithm>
#include <utility>

#include "daemon/device/cuda/box_split.h"
#include "daemon/device/mapping.h"

namespace weightd::cuda {
namespace {

constexpr uint64_t kMostRangeBytes = uint64_t{1} << 62;

BoxKind CastKind(DType from, DType to) {
  if (from == to) return BoxKind::kCopy;
  if (from == DType::kFloat32) {
    return to == DType::kBFloat16 ? BoxKind::kFloat32ToBFloat16 : BoxKind::kFloat32ToFloat16;
  }
  if (from == DType::kFloat16) {
    return to == DType::kBFloat16 ? BoxKind::kFloat16ToBFloat16 : BoxKind::kFloat16ToFloat32;
  }
  return to == DType::kFloat16 ? BoxKind::kBFloat16ToFloat16 : BoxKind::kBFloat16ToFloat32;
}

uint8_t Size(DType dtype) { return static_cast<uint8_t>(SizeBytes(dtype)); }

// The box as the kernels see it, not yet cut. Either block may be absent.
WideBox Describe(BoxKind kind, const RangeBlock* from, const RangeBlock* to,
                 const host::DigestPosition* position, uint32_t word) {
  WideBox box;
  BoxDesc& desc = box.desc;
  desc.kind = kind;
  desc.word = word;
  if (from != nullptr) {
    desc.from_range = from->range;
    desc.from_offset = from->offset_bytes;
    desc.from_size = Size(from->dtype);
  }
  if (to != nullptr) {
    desc.to_range = to->range;
    desc.to_offset = to->offset_bytes;
    desc.to_size = Size(to->dtype);
  }
  desc.digest = position != nullptr;
  if (position != nullptr) desc.key = TensorKey(position->tensor);
  const Dims& extent = from != nullptr ? from->extent : to->extent;
  const int last = extent.size() - 1;
  uint64_t rows = 1;
  for (int d = last; d >= 0; --d) {
    WideDim dim;
    dim.extent = static_cast<uint64_t>(extent[d]);
    if (from != nullptr) dim.from = static_cast<uint64_t>(from->strides[d]) * desc.from_size;
    if (to != nullptr) dim.to = static_cast<uint64_t>(to->strides[d]) * desc.to_size;
    if (position != nullptr) {
      const auto origin = static_cast<uint64_t>(position->origin[d]);
      if (d == last) {
        dim.column = 1;
        desc.first_column = origin;
      } else {
        dim.row = rows;
        desc.first_row += origin * rows;
        rows *= static_cast<uint64_t>(position->shape[d]);
      }
    }
    if (dim.extent > 1) box.dims.insert(box.dims.begin(), dim);
  }
  return box;
}

}  // namespace

uint64_t BoxImage::size_bytes() const {
  uint64_t bytes = range_bytes.size() * sizeof(MemoryRange);
  for (const Section& section : sections) {
    bytes += section.boxes.size() * sizeof(BoxDesc) + section.box_of_tile.size() * 4;
  }
  return bytes;
}

BoxTableBuilder::BoxTableBuilder(std::vector<uint64_t> range_bytes, uint32_t num_words) {
  for (const uint64_t bytes : range_bytes) WEIGHTD_CHECK(bytes < kMostRangeBytes);
  image_.range_bytes = std::move(range_bytes);
  image_.num_words = num_words;
}

Status BoxTableBuilder::CheckBlock(const RangeBlock& block, bool written) const {
  if (block.range >= image_.range_bytes.size()) {
    return Error(StatusCode::kInvalidArgument, reason::kShape, "register the memory first",
                 "box names a range that is not registered: range={} ranges={}", block.range,
                 image_.range_bytes.size());
  }
  const uint64_t size = SizeBytes(block.dtype);
  if (size == 0) {
    return Error(StatusCode::kInvalidArgument, reason::kDtype, "give the block a dtype",
                 "box has no dtype: range={}", block.range);
  }
  if (block.offset_bytes % size != 0) {
    return Error(StatusCode::kInvalidArgument, reason::kShape,
                 "lend a tensor whose address is a multiple of its element size",
                 "box is not aligned to its elements: range={} offset={} element_bytes={}",
                 block.range, block.offset_bytes, size);
  }
  return CheckBlockInside(image_.range_bytes[block.range], block.offset_bytes, block.extent,
                          block.strides, size, written);
}

Status BoxTableBuilder::CheckWord(uint32_t word) const {
  if (word < image_.num_words) return absl::OkStatus();
  return Error(StatusCode::kInvalidArgument, reason::kShape, "report this with the log",
               "box names a digest word that does not exist: word={} words={}", word,
               image_.num_words);
}

Status BoxTableBuilder::AddCopy(const RangeBlock& from, const RangeBlock& to,
                                const host::DigestPosition* position, uint32_t word) {
  if (!CanCast(from.dtype, to.dtype)) {
    return Error(StatusCode::kInvalidArgument, reason::kDtype,
                 "use a dtype that weightd can cast, or the same on both sides",
                 "no cast from {} to {}", Name(from.dtype), Name(to.dtype));
  }
  if (from.extent != to.extent) {
    return Error(StatusCode::kInvalidArgument, reason::kShape, "report this with the log",
                 "source and target of a copy differ: source={} target={}", ToString(from.extent),
                 ToString(to.extent));
  }
  WEIGHTD_RETURN_IF_ERROR(CheckBlock(from, false));
  WEIGHTD_RETURN_IF_ERROR(CheckBlock(to, true));
  if (position != nullptr) {
    WEIGHTD_CHECK(position->shape.size() == from.extent.size());
    WEIGHTD_RETURN_IF_ERROR(CheckWord(word));
  }
  if (NumElements(from.extent) == 0) return absl::OkStatus();
  window_open_ = true;
  AppendBox(Describe(CastKind(from.dtype, to.dtype), &from, &to, position, word), image_);
  return absl::OkStatus();
}

Status BoxTableBuilder::AddDigest(const RangeBlock& block, const host::DigestPosition& position,
                                  uint32_t word) {
  WEIGHTD_RETURN_IF_ERROR(CheckBlock(block, false));
  WEIGHTD_CHECK(position.shape.size() == block.extent.size());
  WEIGHTD_RETURN_IF_ERROR(CheckWord(word));
  if (NumElements(block.extent) == 0) return absl::OkStatus();
  window_open_ = true;
  AppendBox(Describe(BoxKind::kDigest, &block, nullptr, &position, word), image_);
  return absl::OkStatus();
}

Status BoxTableBuilder::AddZero(const RangeBlock& to, uint32_t word) {
  WEIGHTD_RETURN_IF_ERROR(CheckBlock(to, true));
  WEIGHTD_RETURN_IF_ERROR(CheckWord(word));
  if (NumElements(to.extent) == 0) return absl::OkStatus();
  window_open_ = true;
  AppendBox(Describe(BoxKind::kZero, nullptr, &to, nullptr, word), image_);
  return absl::OkStatus();
}

Status BoxTableBuilder::AddZeroCheck(const RangeBlock& block, uint64_t param, uint32_t word) {
  WEIGHTD_RETURN_IF_ERROR(CheckBlock(block, false));
  WEIGHTD_RETURN_IF_ERROR(CheckWord(word));
  if (NumElements(block.extent) == 0) return absl::OkStatus();
  WideBox box = Describe(BoxKind::kZeroCheck, &block, nullptr, nullptr, word);
  box.desc.key = RowWeight(kZeroFillTensor, param, 0);
  window_open_ = true;
  AppendBox(std::move(box), image_);
  return absl::OkStatus();
}

void BoxTableBuilder::EndWindow() {
  for (BoxImage::Section& section : image_.sections) {
    section.window_end.push_back(static_cast<uint32_t>(section.box_of_tile.size()));
  }
  window_open_ = false;
}

BoxImage BoxTableBuilder::Finish() && {
  if (window_open_) EndWindow();
  return std::move(image_);
}

std::optional<PitchedCopy> AsPitchedCopy(const RangeBlock& from, const RangeBlock& to) {
  if (from.dtype != to.dtype || from.extent != to.extent || NumElements(from.extent) == 0) {
    return std::nullopt;
  }
  WideBox box = Describe(BoxKind::kCopy, &from, &to, nullptr, 0);
  JoinDims(box.dims);
  const uint64_t size = SizeBytes(from.dtype);
  PitchedCopy copy{1, size, size, size};
  if (box.dims.empty()) return copy;
  std::sort(box.dims.begin(), box.dims.end(),
            [](const WideDim& a, const WideDim& b) { return a.from < b.from; });
  const auto runs = [&](const WideDim& dim) { return dim.from == size && dim.to == size; };
  size_t used = 0;
  if (runs(box.dims[0])) copy.row_bytes = box.dims[used++].extent * size;
  copy.from_pitch = copy.to_pitch = copy.row_bytes;
  if (used < box.dims.size()) {
    const WideDim& pitch = box.dims[used++];
    copy.rows = pitch.extent;
    copy.from_pitch = pitch.from;
    copy.to_pitch = pitch.to;
  }
  const bool fits = used == box.dims.size() && copy.from_pitch >= copy.row_bytes &&
                    copy.to_pitch >= copy.row_bytes;
  return fits ? std::optional(copy) : std::nullopt;
}

}  // namespace weightd::cuda
