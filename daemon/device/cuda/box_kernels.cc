#include "daemon/device/cuda/box_kernels.h"

#include <cuda_runtime_api.h>

#include <algorithm>

#include "daemon/device/cuda/cuda_status.h"
#include "daemon/device/cuda/device.h"
#include "daemon/device/cuda/kernel_args.h"

namespace weightd::cuda {
namespace {

// Bases must keep the alignment that offsets have in a table.
constexpr uint64_t kBaseAlignment = 16;

template <class T>
StatusOr<DeviceBuffer> UploadAll(const std::vector<T>& values, DeviceId device, StreamRef stream) {
  WEIGHTD_ASSIGN_OR_RETURN(DeviceBuffer buffer,
                           DeviceBuffer::Create(device, values.size() * sizeof(T)));
  WEIGHTD_RETURN_IF_ERROR(buffer.Upload(values.data(), buffer.size_bytes(), 0, stream));
  return buffer;
}

uint32_t TilesBefore(const std::vector<uint32_t>& window_end, uint32_t window) {
  return window == 0 ? 0 : window_end[window - 1];
}

// Fewer blocks than asked for if there is less to do.
int Blocks(int wanted, uint64_t tiles, uint64_t tiles_per_block) {
  const uint64_t useful = (tiles + tiles_per_block - 1) / tiles_per_block;
  return static_cast<int>(std::min<uint64_t>(static_cast<uint64_t>(wanted), useful));
}

int LaunchSection(int section, const BoxArgs& args, int num_blocks, StreamRef stream) {
  const uint64_t tiles = uint64_t{args.end_tile} - args.first_tile;
  if (section == kTilesSection) {
    // Half the threads per block, so twice the blocks.
    return LaunchTiles(args, Blocks(num_blocks * (kRowThreads / kTileThreads), tiles, 1), stream);
  }
  const int blocks = Blocks(num_blocks, tiles, kRowThreads / 32);
  if (section == kElementsSection) return LaunchElements(args, blocks, stream);
  return LaunchVectors(static_cast<BoxKind>(section - kVectorsSection), args, blocks, stream);
}

}  // namespace

StatusOr<DigestWords> DigestWords::Create(DeviceId device, uint32_t num_words) {
  const uint64_t bytes = (uint64_t{num_words} + 1) * sizeof(uint64_t);
  DigestWords words;
  words.num_words_ = num_words;
  WEIGHTD_ASSIGN_OR_RETURN(words.device_, DeviceBuffer::Create(device, bytes));
  WEIGHTD_ASSIGN_OR_RETURN(words.host_, PinnedBuffer::Create(device, bytes));
  return words;
}

Status DigestWords::Clear(StreamRef stream) { return device_.Clear(stream); }

Status DigestWords::Fetch(StreamRef stream) {
  return device_.Download(host_.data(), host_.size_bytes(), 0, stream);
}

StatusOr<std::span<const uint64_t>> DigestWords::Read() const {
  const auto* words = reinterpret_cast<const uint64_t*>(host_.data());
  if (words[num_words_] != 0) {
    return Error(StatusCode::kInternal, reason::kInternal, "report this with the log",
                 "a kernel refused a box outside its ranges and wrote nothing of it: box={}",
                 words[num_words_] - 1);
  }
  return std::span(words, num_words_);
}

uint64_t* DigestWords::device_words() const { return reinterpret_cast<uint64_t*>(device_.data()); }

StatusOr<BoxTable> BoxTable::Create(const BoxImage& image, DeviceId device, StreamRef stream) {
  BoxTable table;
  table.device_ = device;
  table.num_windows_ = image.num_windows();
  table.num_words_ = image.num_words;
  const auto upload = [&](const BoxImage::Section& from, Section& to) -> Status {
    WEIGHTD_ASSIGN_OR_RETURN(to.boxes, UploadAll(from.boxes, device, stream));
    WEIGHTD_ASSIGN_OR_RETURN(to.box_of_tile, UploadAll(from.box_of_tile, device, stream));
    to.window_end = from.window_end;
    return absl::OkStatus();
  };
  for (size_t i = 0; i < table.sections_.size(); ++i) {
    WEIGHTD_RETURN_IF_ERROR(upload(image.sections[i], table.sections_[i]));
  }
  for (const uint64_t bytes : image.range_bytes) table.bound_.push_back({0, bytes});
  WEIGHTD_ASSIGN_OR_RETURN(table.ranges_, UploadAll(table.bound_, device, stream));
  const DeviceGuard guard(device);
  WEIGHTD_RETURN_IF_ERROR(FromCuda(cudaStreamSynchronize(stream), "cannot upload a table"));
  return table;
}

Status BoxTable::SetBases(std::span<std::byte* const> bases, StreamRef stream) {
  if (bases.size() != bound_.size()) {
    return Error(StatusCode::kInvalidArgument, reason::kShape, "report this with the log",
                 "table has another number of ranges: given={} wanted={}", bases.size(),
                 bound_.size());
  }
  bool changed = false;
  for (size_t i = 0; i < bases.size(); ++i) {
    const auto base = reinterpret_cast<uint64_t>(bases[i]);
    if (base % kBaseAlignment != 0) {
      return Error(StatusCode::kInvalidArgument, reason::kShape,
                   "register whole allocations; tensors may lie anywhere inside",
                   "range does not start at a multiple of {} bytes: range={}", kBaseAlignment, i);
    }
    changed |= bound_[i].base != base;
  }
  if (!changed) return absl::OkStatus();
  for (size_t i = 0; i < bases.size(); ++i) {
    bound_[i].base = reinterpret_cast<uint64_t>(bases[i]);
  }
  return ranges_.Upload(bound_.data(), ranges_.size_bytes(), 0, stream);
}

uint64_t BoxTable::size_bytes() const {
  uint64_t bytes = ranges_.size_bytes();
  for (const Section& section : sections_) {
    bytes += section.boxes.size_bytes() + section.box_of_tile.size_bytes();
  }
  return bytes;
}

StatusOr<int> DefaultBlocks(DeviceId device) {
  WEIGHTD_ASSIGN_OR_RETURN(const int multiprocessors, NumMultiprocessors(device));
  return 2 * multiprocessors;
}

Status Launch(const BoxTable& table, uint32_t first_window, uint32_t end_window, DigestWords& words,
              int num_blocks, StreamRef stream) {
  WEIGHTD_CHECK(first_window <= end_window && end_window <= table.num_windows());
  WEIGHTD_CHECK(words.num_words() >= table.num_words());
  if (num_blocks == 0) {
    WEIGHTD_ASSIGN_OR_RETURN(num_blocks, DefaultBlocks(table.device()));
  }
  const DeviceGuard guard(table.device());
  BoxArgs args;
  args.ranges = reinterpret_cast<const MemoryRange*>(table.ranges_.data());
  args.num_ranges = static_cast<uint32_t>(table.bound_.size());
  args.words = reinterpret_cast<unsigned long long*>(words.device_words());
  args.report = args.words + words.num_words();
  for (int i = 0; i < kNumSections; ++i) {
    const BoxTable::Section& section = table.sections_[static_cast<size_t>(i)];
    args.first_tile = TilesBefore(section.window_end, first_window);
    args.end_tile = TilesBefore(section.window_end, end_window);
    if (args.first_tile == args.end_tile) continue;
    args.boxes = reinterpret_cast<const BoxDesc*>(section.boxes.data());
    args.box_of_tile = reinterpret_cast<const uint32_t*>(section.box_of_tile.data());
    WEIGHTD_RETURN_IF_ERROR(
        FromCuda(LaunchSection(i, args, num_blocks, stream), "cannot launch a box kernel"));
  }
  return absl::OkStatus();
}

}  // namespace weightd::cuda
