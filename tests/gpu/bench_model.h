// Models as box lists: a trainer's row shards in one dtype, one engine rank's merged parameters in
// another, laid out in segments as a caching allocator would.
#pragma once

#include <cstdint>
#include <vector>

#include "daemon/device/cuda/box_table.h"

namespace weightd::cuda {

struct BenchOptions {
  DType from = DType::kFloat32;
  DType to = DType::kBFloat16;
  int actors = 1;  ///< every tensor is cut by rows among them
  int tp = 1;      ///< the boxes of rank 0 of so many
  int layers = 0;
};

/// Range 0 is the trainer's memory, range 1 the engine rank's.
class BenchModel {
 public:
  explicit BenchModel(const BenchOptions& options) : options_(options) {}

  /// Llama-3.1-8B: 32 layers unless options say less.
  void AddLlama8B();
  /// Qwen3-30B-A3B: 48 layers of 128 experts unless options say less.
  void AddQwen3Moe();
  /// `count` matrices of 4096 x 4096, kept transposed by the engine.
  void AddTransposed(int count);

  uint64_t source_bytes() const { return source_bytes_; }
  uint64_t target_bytes() const { return target_bytes_; }
  /// Bytes that land: elements of all boxes times the target's element size.
  uint64_t landed_bytes() const { return elements_ * SizeBytes(options_.to); }
  uint64_t elements() const { return elements_; }
  size_t num_boxes() const { return copies_.size(); }

  /// The copies, with source digests if asked for: one word per source tensor.
  BoxImage CopyImage(bool digest) const;
  /// The digests of the parameters in place.
  BoxImage DigestImage() const;

 private:
  struct Copy {
    RangeBlock from;
    RangeBlock to;
    host::DigestPosition position;
  };
  // Allocates a parameter of the engine rank; returns its offset.
  uint64_t Param(const Dims& shape);
  // A source tensor, cut along `cut` (-1: whole) for this rank, at `row` of a parameter with
  // `columns` columns. Returns the rows that landed.
  int64_t Tensor(const Dims& shape, int cut, uint64_t param, int64_t row, int64_t columns);
  void Attention(int64_t hidden, int64_t query, int64_t key_value);

  const BenchOptions options_;
  std::vector<Copy> copies_;
  uint64_t num_tensors_ = 0;
  uint64_t source_bytes_ = 0;
  uint64_t target_bytes_ = 0;
  uint64_t elements_ = 0;
};

}  // namespace weightd::cuda
