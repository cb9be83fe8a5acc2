// Launches the box kernels: one pass from shard to parameter, cast and digest on the way.
//
// A plan's table is uploaded once. A replay uploads the bases of its ranges if they changed and
// launches windows; every call is asynchronous on the stream that it is given. Bytes and digests
// equal those of daemon/device/host bit for bit.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/device/cuda/box_table.h"
#include "daemon/device/cuda/buffer.h"
#include "daemon/device/cuda/handles.h"

namespace weightd::cuda {

/// Digest words in device memory, and the place where a kernel reports a descriptor that it
/// refused. Move-only. Thread safety: none.
class DigestWords {
 public:
  static StatusOr<DigestWords> Create(DeviceId device, uint32_t num_words);

  /// Zeroes all words and the report, in stream order; before the first launch of a step.
  Status Clear(StreamRef stream);
  /// Copies all words to the host, in stream order; after the last launch of a step.
  Status Fetch(StreamRef stream);
  /// The words of the last Fetch, valid until the next. \pre the stream of that Fetch was waited
  /// for \error INTERNAL if a kernel found a box outside its ranges and wrote nothing of it
  StatusOr<std::span<const uint64_t>> Read() const;

  uint32_t num_words() const { return num_words_; }
  uint64_t* device_words() const;

 private:
  DeviceBuffer device_;  // the words, then the report
  PinnedBuffer host_;
  uint32_t num_words_ = 0;
};

/// A table in device memory. Move-only. Thread safety: none.
class BoxTable {
 public:
  /// Uploads a table; the image may be freed when this returns. Bases are still unset.
  static StatusOr<BoxTable> Create(const BoxImage& image, DeviceId device, StreamRef stream);

  /// Sets the address of every range, in stream order; uploads nothing if none changed. An address
  /// may lie on a peer device that this one can reach. \error INVALID_ARGUMENT SHAPE if the number
  /// differs from the table's or an address is not a multiple of 16
  Status SetBases(std::span<std::byte* const> bases, StreamRef stream);

  DeviceId device() const { return device_; }
  uint32_t num_windows() const { return num_windows_; }
  uint32_t num_words() const { return num_words_; }
  /// Device memory that this table holds.
  uint64_t size_bytes() const;

 private:
  friend Status Launch(const BoxTable& table, uint32_t first_window, uint32_t end_window,
                       DigestWords& words, int num_blocks, StreamRef stream);
  struct Section {
    DeviceBuffer boxes;
    DeviceBuffer box_of_tile;
    std::vector<uint32_t> window_end;
  };

  DeviceId device_{};
  std::array<Section, kNumSections> sections_;
  DeviceBuffer ranges_;
  std::vector<MemoryRange> bound_;  // what ranges_ holds
  uint32_t num_windows_ = 0;
  uint32_t num_words_ = 0;
};

/// Runs windows [first_window, end_window) of a table: one kernel per kind of box in them, one
/// after the other. The words add up over launches. `num_blocks` blocks of 512 threads share the
/// work (twice as many of 256 threads where boxes are transposed); 0 means DefaultBlocks. Returns
/// at once; table and words must live until the stream is done. \pre SetBases was called;
/// words.num_words() >= table.num_words(); both are of the same device
Status Launch(const BoxTable& table, uint32_t first_window, uint32_t end_window, DigestWords& words,
              int num_blocks, StreamRef stream);

/// Blocks that fill a device when it reads and writes its own memory.
StatusOr<int> DefaultBlocks(DeviceId device);

/// Blocks that fill an NVLink when targets lie on a peer: more starve local work, fewer than 64
/// leave the link idle (measured on H200: 64 blocks 366 GB/s, 132 blocks 369).
inline constexpr int kRemoteBlocks = 96;

}  // namespace weightd::cuda
