#include "daemon/device/host/cast.h"

#include <catch2/catch.hpp>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "daemon/device/host/float_bits.h"
#include "daemon/layout/digest.h"

namespace weightd::host {
namespace {

constexpr DType kFloats[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

std::vector<Isa> Isas() {
  std::vector<Isa> isas;
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (Supported(isa)) isas.push_back(isa);
  }
  return isas;
}

// The inputs of make_torch_casts.py.
std::vector<uint32_t> Float32Inputs() {
  std::vector<uint32_t> mantissas;
  for (int k = 0; k < 23; ++k) {
    for (const uint32_t low : {(1U << k) - 1, 1U << k, (1U << k) + 1}) {
      mantissas.push_back(low & 0x7fffffU);
      mantissas.push_back(~low & 0x7fffffU);
    }
  }
  std::vector<uint32_t> inputs;
  for (uint32_t head = 0; head < 512; ++head) {
    for (const uint32_t mantissa : mantissas) inputs.push_back((head << 23) | mantissa);
  }
  for (uint64_t i = 0; i < (1U << 20); ++i) inputs.push_back(static_cast<uint32_t>(Mix64(i) >> 32));
  return inputs;
}

std::vector<std::byte> Inputs(DType dtype) {
  std::vector<std::byte> bytes;
  if (dtype == DType::kFloat32) {
    const std::vector<uint32_t> values = Float32Inputs();
    bytes.resize(values.size() * 4);
    std::memcpy(bytes.data(), values.data(), bytes.size());
  } else {
    std::vector<uint16_t> values(1 << 16);
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint16_t>(i);
    bytes.resize(values.size() * 2);
    std::memcpy(bytes.data(), values.data(), bytes.size());
  }
  return bytes;
}

uint64_t Element(const std::vector<std::byte>& bytes, size_t size, size_t i) {
  uint32_t bits = 0;
  std::memcpy(&bits, bytes.data() + i * size, size);
  return bits;
}

}  // namespace

TEST_CASE("casts round to nearest even and keep denormals") {
  CHECK(BFloat16FromFloat32(0x3f800000) == 0x3f80);
  CHECK(BFloat16FromFloat32(0x3f808000) == 0x3f80);  // tie to even
  CHECK(BFloat16FromFloat32(0x3f818000) == 0x3f82);  // tie to even
  CHECK(BFloat16FromFloat32(0x3f808001) == 0x3f81);
  CHECK(BFloat16FromFloat32(0x7f7fffff) == 0x7f80);  // overflow
  CHECK(BFloat16FromFloat32(0x80000001) == 0x8000);
  CHECK(BFloat16FromFloat32(0x00018000) == 0x0002);  // denormal
  CHECK(BFloat16FromFloat32(0xff800001) == kNanBFloat16);
  CHECK(Float16FromFloat32(0x477fefff) == 0x7bff);
  CHECK(Float16FromFloat32(0x477ff000) == 0x7c00);
  CHECK(Float16FromFloat32(0x33000000) == 0x0000);  // half the smallest: to even
  CHECK(Float16FromFloat32(0x33000001) == 0x0001);
  CHECK(Float16FromFloat32(0xb8800000) == 0x8400);
  CHECK(Float16FromFloat32(0xffc12345) == kNanFloat16);
  CHECK(Float32FromFloat16(0x0001) == 0x33800000);
  CHECK(Float32FromFloat16(0xfc01) == kNanFloat32);
  CHECK(Float32FromBFloat16(0xff81) == kNanFloat32);
}

TEST_CASE("every instruction set gives torch's bits") {
  std::ifstream golden(std::string(WEIGHTD_TEST_DATA) + "/casts/torch_casts.txt");
  REQUIRE(golden.good());
  std::string line;
  int casts = 0;
  while (std::getline(golden, line)) {
    if (line.empty() || line[0] == '#') continue;
    std::istringstream fields(line);
    std::string from_name, to_name;
    size_t count = 0;
    uint64_t expected = 0;
    fields >> from_name >> to_name >> count >> expected;
    const DType from = *ParseDType(from_name), to = *ParseDType(to_name);
    const std::vector<std::byte> in = Inputs(from);
    REQUIRE(in.size() == count * SizeBytes(from));
    for (const Isa isa : Isas()) {
      std::vector<std::byte> out(count * SizeBytes(to));
      KernelsFor(isa).Find(from, to)(in.data(), out.data(), count, nullptr, false);
      uint64_t word = 0;
      for (size_t i = 0; i < count; ++i) word += Element(out, SizeBytes(to), i) * Mix64(i);
      INFO(line << " on " << Name(isa));
      CHECK(word == expected);
    }
    ++casts;
  }
  CHECK(casts == 6);
}

TEST_CASE("rows of any length, alignment and store kind agree with single elements") {
  for (const Isa isa : Isas()) {
    const RowKernels& kernels = KernelsFor(isa);
    for (const DType from : kFloats) {
      const std::vector<std::byte> all = Inputs(from);
      for (const DType to : kFloats) {
        const RowCast cast = kernels.Find(from, to);
        const size_t unit = from == to ? SizeBytes(to) : 1;
        std::vector<std::byte> whole(all.size() / SizeBytes(from) * SizeBytes(to));
        KernelsFor(Isa::kPortable)
            .Find(from, to)(all.data(), whole.data(), all.size() / SizeBytes(from) * unit, nullptr,
                            false);
        for (size_t count = 0; count < 200; count += 1 + count / 40) {
          for (size_t shift = 0; shift < 70; shift += 3) {
            const bool stream = shift % 2 == 0;
            std::vector<std::byte> out(shift + count * SizeBytes(to) + 8, std::byte{0xee});
            const size_t first = 32700 - count;
            const uint64_t word = cast(all.data() + first * SizeBytes(from), out.data() + shift,
                                       count * unit, kWordWeights.data(), stream);
            StoreFence();
            const std::byte* expected = whole.data() + first * SizeBytes(to);
            REQUIRE(std::memcmp(out.data() + shift, expected, count * SizeBytes(to)) == 0);
            REQUIRE(out[shift + count * SizeBytes(to)] == std::byte{0xee});
            uint64_t sum = 0;
            for (size_t i = 0; i < count; ++i) {
              uint32_t bits = 0;
              std::memcpy(&bits, expected + i * SizeBytes(to), SizeBytes(to));
              sum += ElementTerm(bits, static_cast<unsigned>(SizeBytes(to)), i * SizeBytes(to));
            }
            REQUIRE(word == sum);
            REQUIRE(kernels.digest(expected, count * SizeBytes(to), kWordWeights.data()) == sum);
          }
        }
      }
    }
  }
}

TEST_CASE("a copy without a cast keeps NaN payloads") {
  const std::vector<uint32_t> in(40, 0xff812345U);
  for (const Isa isa : Isas()) {
    std::vector<uint32_t> out(40);
    KernelsFor(isa).Find(DType::kFloat32, DType::kFloat32)(
        reinterpret_cast<const std::byte*>(in.data()), reinterpret_cast<std::byte*>(out.data()),
        160, nullptr, false);
    CHECK(in == out);
  }
}

}  // namespace weightd::host
