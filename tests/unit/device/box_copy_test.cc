#include "daemon/device/host/box_copy.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstring>
#include <random>
#include <vector>

#include "daemon/device/host/float_bits.h"

namespace weightd::host {
namespace {

constexpr std::byte kGuard{0xc3};

struct Layout {
  Dims strides;
  int64_t span = 1;
};

// Strides that visit the dimensions in a random order, with gaps now and then.
Layout RandomLayout(std::mt19937_64& random, const Dims& extent) {
  std::vector<int> order;
  for (int d = 0; d < extent.size(); ++d) order.push_back(d);
  if (random() % 3 != 0) std::shuffle(order.begin(), order.end(), random);
  Layout layout;
  layout.strides = Dims::Filled(extent.size(), 0);
  if (random() % 5 == 0) layout.span = 2;
  for (auto d = order.rbegin(); d != order.rend(); ++d) {
    layout.strides[*d] = layout.span;
    layout.span *= extent[*d];
    if (random() % 4 == 0) layout.span += static_cast<int64_t>(random() % 5);
  }
  return layout;
}

uint64_t ReadBits(const std::byte* from, size_t size) {
  uint64_t bits = 0;
  std::memcpy(&bits, from, size);
  return bits;
}

uint64_t CastBits(uint64_t bits, DType from, DType to) {
  if (from == to) return bits;
  const auto narrow = static_cast<uint16_t>(bits);
  uint32_t wide = static_cast<uint32_t>(bits);
  if (from == DType::kFloat16) wide = Float32FromFloat16(narrow);
  if (from == DType::kBFloat16) wide = Float32FromBFloat16(narrow);
  if (to == DType::kFloat16) return Float16FromFloat32(wide);
  if (to == DType::kBFloat16) return BFloat16FromFloat32(wide);
  return wide;
}

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

void CheckRandomCopy(std::mt19937_64& random, const RowKernels& kernels, const Pair& pair) {
  Dims extent;
  DigestPosition position;
  position.tensor = random() % 50;
  const int dims = static_cast<int>(random() % 5);
  for (int d = 0; d < dims; ++d) {
    const int64_t limit = d >= dims - 2 ? 150 : 4;
    extent.push_back(1 + static_cast<int64_t>(random()) % limit);
    if (extent[d] < 1) extent[d] = 1;
    position.origin.push_back(static_cast<int64_t>(random() % 3000));
    position.shape.push_back(position.origin[d] + extent[d]);
  }
  const size_t from_size = SizeBytes(pair.from), to_size = SizeBytes(pair.to);
  const Layout in = RandomLayout(random, extent), out = RandomLayout(random, extent);
  std::vector<std::byte> source(static_cast<size_t>(in.span) * from_size);
  for (std::byte& byte : source) byte = static_cast<std::byte>(random());
  std::vector<std::byte> target(static_cast<size_t>(out.span) * to_size, kGuard);
  std::vector<std::byte> expected = target;
  for (int64_t n = 0; n < NumElements(extent); ++n) {
    int64_t rest = n, a = 0, b = 0;
    for (int d = dims - 1; d >= 0; --d) {
      a += rest % extent[d] * in.strides[d];
      b += rest % extent[d] * out.strides[d];
      rest /= extent[d];
    }
    const uint64_t bits =
        CastBits(ReadBits(source.data() + static_cast<size_t>(a) * from_size, from_size), pair.from,
                 pair.to);
    std::memcpy(expected.data() + static_cast<size_t>(b) * to_size, &bits, to_size);
  }
  const ConstBlock from{source.data(), pair.from, extent, in.strides};
  const Block to{target.data(), pair.to, extent, out.strides};
  const bool stream = random() % 2 == 0;
  CHECK(CopyBlock(kernels, from, to, nullptr, stream) == 0);
  REQUIRE(target == expected);
  std::fill(target.begin(), target.end(), kGuard);
  const uint64_t word = CopyBlock(kernels, from, to, &position, stream);
  REQUIRE(target == expected);
  const ConstBlock landed{target.data(), pair.to, extent, out.strides};
  REQUIRE(DigestBlock(kernels, landed, position) == word);
}

}  // namespace

TEST_CASE("a block lands exactly, whatever its strides, and is digested as it landed") {
  const uint64_t seed = 99;
  INFO("seed " << seed);
  std::mt19937_64 random(seed);
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (!Supported(isa)) continue;
    for (int round = 0; round < 25; ++round) {
      for (const Pair& pair : kPairs) CheckRandomCopy(random, KernelsFor(isa), pair);
    }
  }
}

TEST_CASE("a transposed matrix is digested by its source position") {
  std::vector<uint32_t> source(70 * 130);
  for (size_t i = 0; i < source.size(); ++i)
    source[i] = 0x3f800000U + static_cast<uint32_t>(i * 77);
  std::vector<uint16_t> straight(source.size()), turned(source.size());
  const ConstBlock from{
      reinterpret_cast<const std::byte*>(source.data()), DType::kFloat32, {70, 130}, {130, 1}};
  const DigestPosition position{4, {70, 130}, {0, 0}};
  const Block plain{
      reinterpret_cast<std::byte*>(straight.data()), DType::kBFloat16, {70, 130}, {130, 1}};
  const Block cross{
      reinterpret_cast<std::byte*>(turned.data()), DType::kBFloat16, {70, 130}, {1, 70}};
  const uint64_t a = CopyBlock(BestKernels(), from, plain, &position, false);
  const uint64_t b = CopyBlock(BestKernels(), from, cross, &position, true);
  CHECK(a == b);
  for (size_t r = 0; r < 70; ++r) {
    for (size_t c = 0; c < 130; ++c) REQUIRE(turned[c * 70 + r] == straight[r * 130 + c]);
  }
}

TEST_CASE("zero fill clears its block and nothing else") {
  for (const Dims& strides : {Dims{20, 1}, Dims{1, 9}, Dims{40, 2}}) {
    std::vector<uint16_t> values(400, 7);
    ZeroBlock({reinterpret_cast<std::byte*>(values.data()), DType::kBFloat16, {8, 15}, strides});
    std::vector<uint16_t> expected(400, 7);
    for (int64_t r = 0; r < 8; ++r) {
      for (int64_t c = 0; c < 15; ++c) {
        expected[static_cast<size_t>(r * strides[0] + c * strides[1])] = 0;
      }
    }
    CHECK(values == expected);
  }
}

}  // namespace weightd::host
