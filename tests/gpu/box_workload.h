// Random boxes of every kind with what the host path makes of them: what the GPU's box kernels, and
// on machines without a GPU their arithmetic, have to repeat bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "daemon/device/cuda/box_table.h"

namespace weightd::cuda {

/// Boxes between two ranges: 0 is read, 1 is written.
class BoxWorkload {
 public:
  /// `boxes` random boxes; the same seed gives the same workload.
  BoxWorkload(uint64_t seed, int boxes);

  const BoxImage& image() const { return image_; }
  /// Range 0: random bytes. Range 1 before the boxes run: guard bytes.
  const std::vector<std::byte>& source() const { return source_; }
  const std::vector<std::byte>& target() const { return target_; }
  /// Range 1 and the digest words afterwards, by daemon/device/host.
  const std::vector<std::byte>& expected() const { return expected_; }
  const std::vector<uint64_t>& words() const { return words_; }

 private:
  struct Shape {
    Dims extent;
    Dims from;
    Dims to;
    host::DigestPosition position;
  };
  enum class What : uint8_t { kCopy, kPlainCopy, kDigest, kZero, kZeroCheck };
  struct Box {
    What what;
    RangeBlock from;
    RangeBlock to;
    host::DigestPosition position;
  };

  Shape RandomShape();
  Shape AlignedShape(int64_t element_bytes);
  Dims RandomStrides(const Dims& extent);
  void AddBox();
  void Expect(const Box& box, uint64_t& word);
  uint64_t Place(uint64_t& used, const Dims& extent, const Dims& strides, uint64_t size,
                 bool aligned);

  std::mt19937_64 random_;
  std::vector<Box> boxes_;
  uint64_t source_bytes_ = 0;
  uint64_t target_bytes_ = 0;
  BoxImage image_;
  std::vector<std::byte> source_, target_, expected_;
  std::vector<uint64_t> words_;
};

}  // namespace weightd::cuda
