#include "daemon/device/host/digest.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstring>
#include <random>
#include <vector>

namespace weightd::host {
namespace {

// The definition at the top of daemon/layout/digest.h, element by element.
uint64_t Reference(const ConstBlock& block, const DigestPosition& position) {
  const auto size = static_cast<int64_t>(SizeBytes(block.dtype));
  uint64_t sum = 0;
  for (int64_t n = 0; n < NumElements(block.extent); ++n) {
    int64_t rest = n, at = 0, row = 0, column = 0, rows = 1;
    for (int d = block.extent.size() - 1; d >= 0; --d) {
      const int64_t index = rest % block.extent[d];
      rest /= block.extent[d];
      at += index * block.strides[d];
      if (d == block.extent.size() - 1) {
        column = position.origin[d] + index;
      } else {
        row += (position.origin[d] + index) * rows;
        rows *= position.shape[d];
      }
    }
    for (int64_t half = 0; half < std::max<int64_t>(1, size / 4); ++half) {
      const int64_t bytes = std::min<int64_t>(size, 4);
      uint32_t bits = 0;
      std::memcpy(&bits, block.base + at * size + 4 * half, static_cast<size_t>(bytes));
      const int64_t byte = column * size + 4 * half;
      sum += RowWeight(position.tensor, static_cast<uint64_t>(row),
                       static_cast<uint64_t>(byte / kDigestBlockBytes)) *
             ElementTerm(bits, static_cast<unsigned>(bytes),
                         static_cast<uint64_t>(byte % kDigestBlockBytes));
    }
  }
  return sum;
}

std::vector<std::byte> RandomBytes(std::mt19937_64& random, size_t size) {
  std::vector<std::byte> bytes(size);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

constexpr DType kSizes[] = {DType::kUInt8, DType::kBFloat16, DType::kFloat32, DType::kInt64};

}  // namespace

TEST_CASE("the digest is the sum that layout/digest.h defines, for any strides") {
  const uint64_t seed = 20240611;
  INFO("seed " << seed);
  std::mt19937_64 random(seed);
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (!Supported(isa)) continue;
    for (int round = 0; round < 120; ++round) {
      ConstBlock block;
      DigestPosition position;
      block.dtype = kSizes[round % 4];
      position.tensor = random() % 1000;
      const int dims = static_cast<int>(random() % 4);
      std::vector<int> order;
      for (int d = 0; d < dims; ++d) {
        const int64_t extent = 1 + static_cast<int64_t>(random() % (d == dims - 1 ? 200 : 9));
        block.extent.push_back(extent);
        position.origin.push_back(static_cast<int64_t>(random() % 5000));
        position.shape.push_back(position.origin[d] + extent + static_cast<int64_t>(random() % 3));
        order.push_back(d);
      }
      if (round % 2 == 1) std::shuffle(order.begin(), order.end(), random);
      block.strides = Dims::Filled(dims, 0);
      int64_t span = 1 + static_cast<int64_t>(round % 3 == 2);
      for (int i = dims - 1; i >= 0; --i) {
        block.strides[order[static_cast<size_t>(i)]] = span;
        span *= block.extent[order[static_cast<size_t>(i)]];
      }
      const auto memory =
          RandomBytes(random, static_cast<size_t>(span) * SizeBytes(block.dtype) + 8);
      block.base = memory.data();
      REQUIRE(DigestBlock(KernelsFor(isa), block, position) == Reference(block, position));
    }
  }
}

TEST_CASE("the digest is additive over any split") {
  std::mt19937_64 random(7);
  for (const DType dtype : kSizes) {
    const auto size = static_cast<int64_t>(SizeBytes(dtype));
    const auto memory = RandomBytes(random, static_cast<size_t>(6 * 5000 * size));
    const ConstBlock whole{memory.data(), dtype, {6, 5000}, {5000, 1}};
    const DigestPosition position{9, {6, 5000}, {0, 0}};
    uint64_t sum = 0;
    for (const int64_t rows : {0, 2, 3}) {
      const int64_t next_row = rows == 0 ? 2 : (rows == 2 ? 3 : 6);
      for (int64_t column = 0; column < 5000;) {
        const int64_t next =
            std::min<int64_t>(5000, column + 1 + static_cast<int64_t>(random() % 999));
        const ConstBlock part{memory.data() + (rows * 5000 + column) * size,
                              dtype,
                              {next_row - rows, next - column},
                              {5000, 1}};
        sum += DigestBlock(BestKernels(), part, {9, {6, 5000}, {rows, column}});
        column = next;
      }
    }
    CHECK(sum == DigestBlock(BestKernels(), whole, position));
  }
}

TEST_CASE("weights of one block are odd and differ") {
  std::vector<uint32_t> weights(kWordWeights.begin(), kWordWeights.begin() + kDigestBlockWords);
  std::sort(weights.begin(), weights.end());
  CHECK(std::adjacent_find(weights.begin(), weights.end()) == weights.end());
  CHECK(std::all_of(weights.begin(), weights.end(), [](uint32_t w) { return (w & 1) == 1; }));
}

TEST_CASE("every flipped bit and every swap of unequal neighbours changes the digest") {
  std::mt19937_64 random(11);
  std::vector<uint16_t> values(3 * 40);
  for (uint16_t& value : values) value = static_cast<uint16_t>(random());
  const ConstBlock block{
      reinterpret_cast<const std::byte*>(values.data()), DType::kBFloat16, {3, 40}, {40, 1}};
  const DigestPosition position{1, {3, 40}, {0, 0}};
  const auto digest = [&] { return DigestBlock(BestKernels(), block, position); };
  const uint64_t before = digest();
  for (size_t i = 0; i < values.size(); ++i) {
    for (int bit = 0; bit < 16; ++bit) {
      values[i] = static_cast<uint16_t>(values[i] ^ (1 << bit));
      REQUIRE(digest() != before);
      values[i] = static_cast<uint16_t>(values[i] ^ (1 << bit));
    }
    for (size_t j = i + 1; j < values.size(); ++j) {
      if (values[i] == values[j]) continue;
      std::swap(values[i], values[j]);
      REQUIRE(digest() != before);
      std::swap(values[i], values[j]);
    }
  }
  CHECK(digest() == before);
  CHECK(DigestBlock(BestKernels(), block, {2, {3, 40}, {0, 0}}) != before);
}

TEST_CASE("the zero-fill word counts elements and shows any that is not zero") {
  std::vector<uint16_t> values(6 * 10, 0);
  const ConstBlock block{
      reinterpret_cast<const std::byte*>(values.data()), DType::kBFloat16, {6, 4}, {10, 1}};
  CHECK(ZeroFillWord(block, 3) == 24);
  values[4] = 1;  // outside the block
  CHECK(ZeroFillWord(block, 3) == 24);
  for (const size_t at : {size_t{0}, size_t{13}, size_t{53}}) {
    values[at] = 0x8000;
    CHECK(ZeroFillWord(block, 3) == 24 + RowWeight(kZeroFillTensor, 3, 0));
    values[at] = 0;
  }
}

TEST_CASE("an empty block has digest zero") {
  const ConstBlock block{nullptr, DType::kFloat32, {0, 8}, {8, 1}};
  CHECK(DigestBlock(BestKernels(), block, {1, {4, 8}, {2, 0}}) == 0);
  CHECK(ZeroFillWord(block, 0) == 0);
}

}  // namespace weightd::host
