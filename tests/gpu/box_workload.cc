#include "tests/gpu/box_workload.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "daemon/base/status.h"
#include "daemon/device/host/box_copy.h"

namespace weightd::cuda {
namespace {

constexpr std::byte kGuard{0xc3};

struct Pair {
  DType from;
  DType to;
};
constexpr Pair kPairs[] = {
    {DType::kFloat32, DType::kBFloat16}, {DType::kFloat32, DType::kFloat16},
    {DType::kBFloat16, DType::kFloat32}, {DType::kFloat16, DType::kBFloat16},
    {DType::kBFloat16, DType::kFloat16}, {DType::kFloat16, DType::kFloat32},
    {DType::kUInt8, DType::kUInt8},      {DType::kBFloat16, DType::kBFloat16},
    {DType::kFloat32, DType::kFloat32},  {DType::kInt64, DType::kInt64}};

uint64_t Span(const Dims& extent, const Dims& strides) {
  uint64_t last = 0;
  for (int d = 0; d < extent.size(); ++d) {
    last += static_cast<uint64_t>((extent[d] - 1) * strides[d]);
  }
  return last + 1;
}

void Must(const Status& status) { WEIGHTD_CHECK(status.ok()); }

}  // namespace

BoxWorkload::BoxWorkload(uint64_t seed, int boxes) : random_(seed) {
  for (int i = 0; i < boxes; ++i) AddBox();
  source_.resize(source_bytes_);
  for (size_t i = 0; i < source_.size(); i += 8) {
    const uint64_t bits = random_();
    std::memcpy(source_.data() + i, &bits, std::min<size_t>(8, source_.size() - i));
  }
  target_.assign(target_bytes_, kGuard);
  expected_ = target_;
  words_.assign(boxes_.size(), 0);
  BoxTableBuilder builder({source_bytes_, target_bytes_}, static_cast<uint32_t>(boxes));
  for (size_t i = 0; i < boxes_.size(); ++i) {
    const Box& box = boxes_[i];
    const auto word = static_cast<uint32_t>(i);
    switch (box.what) {
      case What::kCopy:
        Must(builder.AddCopy(box.from, box.to, &box.position, word));
        break;
      case What::kPlainCopy:
        Must(builder.AddCopy(box.from, box.to, nullptr, 0));
        break;
      case What::kDigest:
        Must(builder.AddDigest(box.from, box.position, word));
        break;
      case What::kZero:
        Must(builder.AddZero(box.to, word));
        break;
      case What::kZeroCheck:
        Must(builder.AddZeroCheck(box.from, i % 7, word));
        break;
    }
    Expect(box, words_[i]);
    if (random_() % 16 == 0) builder.EndWindow();
  }
  image_ = std::move(builder).Finish();
}

// Strides that visit the dimensions in a random order, with gaps now and then.
Dims BoxWorkload::RandomStrides(const Dims& extent) {
  std::vector<int> order;
  for (int d = 0; d < extent.size(); ++d) order.push_back(d);
  if (random_() % 3 != 0) std::shuffle(order.begin(), order.end(), random_);
  Dims strides = Dims::Filled(extent.size(), 0);
  int64_t span = random_() % 5 == 0 ? 2 : 1;
  for (auto d = order.rbegin(); d != order.rend(); ++d) {
    strides[*d] = span;
    span *= extent[*d];
    if (random_() % 4 == 0) span += static_cast<int64_t>(random_() % 5);
  }
  return strides;
}

BoxWorkload::Shape BoxWorkload::RandomShape() {
  Shape shape;
  shape.position.tensor = random_() % 50;
  const int dims = static_cast<int>(random_() % 8);
  for (int d = 0; d < dims; ++d) {
    const uint64_t limit = d >= dims - 2 ? 150 : 3;
    shape.extent.push_back(1 + static_cast<int64_t>(random_() % limit));
    shape.position.origin.push_back(static_cast<int64_t>(random_() % 3000));
    shape.position.shape.push_back(shape.position.origin[d] + shape.extent[d] +
                                   static_cast<int64_t>(random_() % 3));
  }
  shape.from = RandomStrides(shape.extent);
  shape.to = RandomStrides(shape.extent);
  return shape;
}

// Rows of whole vectors, as models have them: contiguous, narrowed or transposed.
BoxWorkload::Shape BoxWorkload::AlignedShape(int64_t element_bytes) {
  Shape shape;
  const int64_t step = 32 / std::min<int64_t>(element_bytes, 2);
  const int64_t rows = 1 + static_cast<int64_t>(random_() % 70);
  const int64_t columns = step * (1 + static_cast<int64_t>(random_() % 400));
  const int64_t before = random_() % 2 == 0 ? 0 : step * static_cast<int64_t>(random_() % 300);
  const int64_t after = random_() % 2 == 0 ? 0 : static_cast<int64_t>(random_() % 5);
  shape.extent = {rows, columns};
  shape.position = {random_() % 50, {rows + 7, before + columns + after}, {5, before}};
  const auto strides = [&]() -> Dims {
    switch (random_() % 6) {
      case 0:
        return {1, rows};
      case 1:
      case 2:
        return {columns + step * static_cast<int64_t>(random_() % 9), 1};
      default:
        return {columns, 1};
    }
  };
  shape.from = strides();
  shape.to = strides();
  return shape;
}

uint64_t BoxWorkload::Place(uint64_t& used, const Dims& extent, const Dims& strides, uint64_t size,
                            bool aligned) {
  uint64_t offset = (used + 255) / 256 * 256;
  if (!aligned) offset += size * (random_() % 16);
  used = offset + Span(extent, strides) * size + random_() % 32;
  return offset;
}

void BoxWorkload::AddBox() {
  const Pair pair = kPairs[random_() % std::size(kPairs)];
  const uint64_t from_size = SizeBytes(pair.from), to_size = SizeBytes(pair.to);
  const bool aligned = random_() % 2 == 0;
  const Shape shape =
      aligned ? AlignedShape(static_cast<int64_t>(std::min(from_size, to_size))) : RandomShape();
  constexpr What kAll[] = {What::kCopy,      What::kCopy,      What::kCopy,   What::kCopy,
                           What::kPlainCopy, What::kPlainCopy, What::kDigest, What::kDigest,
                           What::kZero,      What::kZeroCheck};
  Box box;
  box.what = kAll[random_() % std::size(kAll)];
  box.position = shape.position;
  if (box.what != What::kZero) {
    box.from = {0, Place(source_bytes_, shape.extent, shape.from, from_size, aligned), pair.from,
                shape.extent, shape.from};
  }
  if (box.what != What::kDigest && box.what != What::kZeroCheck) {
    box.to = {1, Place(target_bytes_, shape.extent, shape.to, to_size, aligned), pair.to,
              shape.extent, shape.to};
  }
  boxes_.push_back(box);
}

void BoxWorkload::Expect(const Box& box, uint64_t& word) {
  const host::ConstBlock from{source_.data() + box.from.offset_bytes, box.from.dtype,
                              box.from.extent, box.from.strides};
  const host::Block to{expected_.data() + box.to.offset_bytes, box.to.dtype, box.to.extent,
                       box.to.strides};
  switch (box.what) {
    case What::kCopy:
      word = host::CopyBlock(host::BestKernels(), from, to, &box.position, false);
      break;
    case What::kPlainCopy:
      host::CopyBlock(host::BestKernels(), from, to, nullptr, false);
      break;
    case What::kDigest:
      word = host::DigestBlock(host::BestKernels(), from, box.position);
      break;
    case What::kZero:
      host::ZeroBlock(to);
      word = static_cast<uint64_t>(NumElements(box.to.extent));
      break;
    case What::kZeroCheck: {
      // Random bytes, the first half of them zeros, so that both answers are met.
      auto* bytes = source_.data() + box.from.offset_bytes;
      std::memset(bytes, 0,
                  Span(box.from.extent, box.from.strides) * SizeBytes(box.from.dtype) / 2);
      word = host::ZeroFillWord(from, (&box - boxes_.data()) % 7);
      break;
    }
  }
}

}  // namespace weightd::cuda
