#include "tests/gpu/bench_model.h"

#include <algorithm>
#include <utility>

#include "daemon/base/status.h"

namespace weightd::cuda {
namespace {

// A caching allocator's granularity.
uint64_t Aligned(uint64_t bytes) { return (bytes + 511) / 512 * 512; }

void Must(const Status& status) { WEIGHTD_CHECK(status.ok()); }

}  // namespace

uint64_t BenchModel::Param(const Dims& shape) {
  const uint64_t offset = target_bytes_;
  target_bytes_ += Aligned(static_cast<uint64_t>(NumElements(shape)) * SizeBytes(options_.to));
  return offset;
}

int64_t BenchModel::Tensor(const Dims& shape, int cut, uint64_t param, int64_t row,
                           int64_t columns) {
  const int64_t rows = shape[0];
  const int64_t all_columns = shape.size() == 1 ? 1 : shape[1];
  int64_t end = rows, column_end = all_columns;
  if (cut == 0) end = rows / options_.tp;
  if (cut == 1) column_end = all_columns / options_.tp;
  const RangeBlock target{1,
                          param + static_cast<uint64_t>(row * columns) * SizeBytes(options_.to),
                          options_.to,
                          {end, column_end},
                          {columns, 1}};
  const int64_t chunk = (rows + options_.actors - 1) / options_.actors;
  for (int64_t first = 0; first < rows; first += chunk) {
    const int64_t last = std::min(rows, first + chunk);
    const uint64_t shard = source_bytes_;
    source_bytes_ +=
        Aligned(static_cast<uint64_t>((last - first) * all_columns) * SizeBytes(options_.from));
    const int64_t stop = std::min(last, end);
    if (first >= stop) continue;
    Copy copy;
    copy.position = {num_tensors_, {rows, all_columns}, {first, 0}};
    copy.from = {0, shard, options_.from, {stop - first, column_end}, {all_columns, 1}};
    copy.to = target;
    copy.to.offset_bytes += static_cast<uint64_t>(first * columns) * SizeBytes(options_.to);
    copy.to.extent = copy.from.extent;
    if (shape.size() == 1) {
      copy.position = {num_tensors_, shape, {first}};
      copy.from.extent = copy.to.extent = {stop - first};
      copy.from.strides = copy.to.strides = {1};
    }
    elements_ += static_cast<uint64_t>(NumElements(copy.from.extent));
    copies_.push_back(copy);
  }
  ++num_tensors_;
  return end;
}

// Merged qkv (column-parallel), o (row-parallel) and the two norms of a layer.
void BenchModel::Attention(int64_t hidden, int64_t query, int64_t key_value) {
  const int64_t tp = options_.tp;
  const uint64_t qkv = Param({(query + 2 * key_value) / tp, hidden});
  int64_t row = Tensor({query, hidden}, 0, qkv, 0, hidden);
  row += Tensor({key_value, hidden}, 0, qkv, row, hidden);
  Tensor({key_value, hidden}, 0, qkv, row, hidden);
  Tensor({hidden, query}, 1, Param({hidden, query / tp}), 0, query / tp);
  for (int norm = 0; norm < 2; ++norm) Tensor({hidden}, -1, Param({hidden}), 0, 1);
}

void BenchModel::AddLlama8B() {
  constexpr int64_t kHidden = 4096, kIntermediate = 14336, kVocab = 128256;
  const int64_t tp = options_.tp;
  for (int head = 0; head < 2; ++head) {
    Tensor({kVocab, kHidden}, 0, Param({kVocab / tp, kHidden}), 0, kHidden);
  }
  const int layers = options_.layers != 0 ? options_.layers : 32;
  for (int layer = 0; layer < layers; ++layer) {
    Attention(kHidden, 4096, 1024);
    const uint64_t gate_up = Param({2 * kIntermediate / tp, kHidden});
    const int64_t row = Tensor({kIntermediate, kHidden}, 0, gate_up, 0, kHidden);
    Tensor({kIntermediate, kHidden}, 0, gate_up, row, kHidden);
    Tensor({kHidden, kIntermediate}, 1, Param({kHidden, kIntermediate / tp}), 0,
           kIntermediate / tp);
  }
  Tensor({kHidden}, -1, Param({kHidden}), 0, 1);
}

void BenchModel::AddQwen3Moe() {
  constexpr int64_t kHidden = 2048, kExpert = 768, kExperts = 128, kVocab = 151936;
  const int64_t tp = options_.tp, slice = kExpert / tp;
  for (int head = 0; head < 2; ++head) {
    Tensor({kVocab, kHidden}, 0, Param({kVocab / tp, kHidden}), 0, kHidden);
  }
  const int layers = options_.layers != 0 ? options_.layers : 48;
  for (int layer = 0; layer < layers; ++layer) {
    Attention(kHidden, 4096, 512);
    for (int norm = 0; norm < 2; ++norm) Tensor({128}, -1, Param({128}), 0, 1);
    Tensor({kExperts, kHidden}, -1, Param({kExperts, kHidden}), 0, kHidden);
    const uint64_t w13 = Param({kExperts * 2 * slice, kHidden});
    const uint64_t w2 = Param({kExperts * kHidden, slice});
    for (int64_t expert = 0; expert < kExperts; ++expert) {
      for (int64_t half = 0; half < 2; ++half) {
        Tensor({kExpert, kHidden}, 0, w13, (2 * expert + half) * slice, kHidden);
      }
      Tensor({kHidden, kExpert}, 1, w2, expert * kHidden, slice);
    }
  }
  Tensor({kHidden}, -1, Param({kHidden}), 0, 1);
}

void BenchModel::AddTransposed(int count) {
  constexpr int64_t kSide = 4096;
  for (int i = 0; i < count; ++i) {
    Tensor({kSide, kSide}, -1, Param({kSide, kSide}), 0, kSide);
    copies_.back().to.strides = {1, kSide};
  }
}

BoxImage BenchModel::CopyImage(bool digest) const {
  BoxTableBuilder builder({source_bytes_, target_bytes_}, static_cast<uint32_t>(num_tensors_));
  for (const Copy& copy : copies_) {
    Must(builder.AddCopy(copy.from, copy.to, digest ? &copy.position : nullptr,
                         static_cast<uint32_t>(copy.position.tensor)));
  }
  return std::move(builder).Finish();
}

BoxImage BenchModel::DigestImage() const {
  BoxTableBuilder builder({source_bytes_, target_bytes_}, static_cast<uint32_t>(num_tensors_));
  for (const Copy& copy : copies_) {
    Must(builder.AddDigest(copy.to, copy.position, static_cast<uint32_t>(copy.position.tensor)));
  }
  return std::move(builder).Finish();
}

}  // namespace weightd::cuda
