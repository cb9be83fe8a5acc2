// The box kernels beside the host path: the same boxes have to give the same bytes and words.
#include "daemon/device/cuda/box_kernels.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "daemon/device/host/digest.h"
#include "tests/gpu/box_workload.h"
#include "tests/gpu/gpu_testing.h"

namespace weightd::cuda {
namespace {

constexpr std::byte kGuard{0xc3};

// WEIGHTD_GPU_TEST_SEEDS lowers the number of random tables, for slow checkers.
int NumSeeds() {
  const char* wanted = std::getenv("WEIGHTD_GPU_TEST_SEEDS");
  return wanted != nullptr ? std::atoi(wanted) : 60;
}

// tests/data, or where run.sh has carried it.
std::string TestData() {
  const char* carried = std::getenv("WEIGHTD_TEST_DATA");
  return carried != nullptr ? carried : WEIGHTD_TEST_DATA;
}

std::vector<std::byte> RandomBytes(size_t count) {
  std::vector<std::byte> bytes(count);
  for (size_t i = 0; i < count; ++i) bytes[i] = static_cast<std::byte>(Mix64(i));
  return bytes;
}

// The inputs of tests/unit/device/make_torch_casts.py.
std::vector<std::byte> CastInputs(DType dtype) {
  std::vector<uint32_t> wide;
  if (dtype == DType::kFloat32) {
    std::vector<uint32_t> mantissas;
    for (int k = 0; k < 23; ++k) {
      for (const uint32_t low : {(1U << k) - 1, 1U << k, (1U << k) + 1}) {
        mantissas.push_back(low & 0x7fffffU);
        mantissas.push_back(~low & 0x7fffffU);
      }
    }
    for (uint32_t head = 0; head < 512; ++head) {
      for (const uint32_t mantissa : mantissas) wide.push_back((head << 23) | mantissa);
    }
    for (uint64_t i = 0; i < (1U << 20); ++i) wide.push_back(static_cast<uint32_t>(Mix64(i) >> 32));
  } else {
    for (uint32_t i = 0; i < (1U << 15); ++i) wide.push_back((2 * i) | ((2 * i + 1) << 16));
  }
  std::vector<std::byte> bytes(wide.size() * 4);
  std::memcpy(bytes.data(), wide.data(), bytes.size());
  return bytes;
}

}  // namespace

TEST_CASE("boxes of every kind land and are digested as on the host") {
  const Stream stream = Must(Stream::Create(kDevice));
  for (int seed = 100; seed < 100 + NumSeeds(); ++seed) {
    INFO("seed " << seed);
    const BoxWorkload workload(static_cast<uint64_t>(seed), 120);
    BoxTable table = Must(BoxTable::Create(workload.image(), kDevice, stream.ref()));
    CHECK(table.size_bytes() == workload.image().size_bytes());
    DigestWords words = Must(DigestWords::Create(kDevice, table.num_words()));
    const DeviceBuffer source = Uploaded(workload.source(), stream);
    const DeviceBuffer target = Uploaded(workload.target(), stream);
    std::byte* const bases[] = {source.data(), target.data()};
    Must(table.SetBases(bases, stream.ref()));
    const int blocks[] = {0, 1, 7, kRemoteBlocks};
    Run(table, 0, table.num_windows(), words, blocks[seed % 4], stream);
    REQUIRE(Downloaded(target, stream) == workload.expected());
    const auto read = Must(words.Read());
    for (size_t i = 0; i < read.size(); ++i) {
      INFO("box " << i);
      REQUIRE(read[i] == workload.words()[i]);
    }
    REQUIRE(Downloaded(source, stream) == workload.source());
  }
}

TEST_CASE("windows in turn add up to the whole table") {
  const Stream stream = Must(Stream::Create(kDevice));
  const BoxWorkload workload(7, 150);
  BoxTable table = Must(BoxTable::Create(workload.image(), kDevice, stream.ref()));
  REQUIRE(table.num_windows() > 3);
  DigestWords words = Must(DigestWords::Create(kDevice, table.num_words()));
  const DeviceBuffer source = Uploaded(workload.source(), stream);
  const DeviceBuffer target = Uploaded(workload.target(), stream);
  std::byte* const bases[] = {source.data(), target.data()};
  Must(table.SetBases(bases, stream.ref()));
  Must(words.Clear(stream.ref()));
  for (uint32_t w = 0; w < table.num_windows(); ++w) {
    Must(Launch(table, w, w, words, 0, stream.ref()));  // nothing
    Must(Launch(table, w, w + 1, words, 0, stream.ref()));
  }
  Must(words.Fetch(stream.ref()));
  Must(stream.Synchronize());
  CHECK(Downloaded(target, stream) == workload.expected());
  const auto read = Must(words.Read());
  CHECK(std::equal(read.begin(), read.end(), workload.words().begin()));
}

TEST_CASE("a table serves again after its ranges have moved") {
  const Stream stream = Must(Stream::Create(kDevice));
  const BoxWorkload workload(21, 40);
  BoxTable table = Must(BoxTable::Create(workload.image(), kDevice, stream.ref()));
  DigestWords words = Must(DigestWords::Create(kDevice, table.num_words()));
  for (int round = 0; round < 3; ++round) {
    const DeviceBuffer source = Uploaded(workload.source(), stream);
    const DeviceBuffer target = Uploaded(workload.target(), stream);
    std::byte* const bases[] = {source.data(), target.data()};
    Must(table.SetBases(bases, stream.ref()));
    Must(table.SetBases(bases, stream.ref()));
    Run(table, 0, table.num_windows(), words, 0, stream);
    CHECK(Downloaded(target, stream) == workload.expected());
    CHECK(words.Read().ok());
  }
  std::byte* const odd[] = {reinterpret_cast<std::byte*>(0x1008), nullptr};
  CHECK(FieldsOf(table.SetBases(odd, stream.ref())).reason == reason::kShape);
  CHECK_FALSE(table.SetBases({}, stream.ref()).ok());
}

TEST_CASE("casts give torch's bits, in vectors and one by one") {
  std::ifstream golden(TestData() + "/casts/torch_casts.txt");
  REQUIRE(golden.good());
  const Stream stream = Must(Stream::Create(kDevice));
  int casts = 0;
  for (std::string line; std::getline(golden, line);) {
    if (line.empty() || line[0] == '#') continue;
    std::istringstream fields(line);
    std::string from_name, to_name;
    int64_t count = 0;
    uint64_t expected = 0;
    fields >> from_name >> to_name >> count >> expected;
    const DType from = *ParseDType(from_name), to = *ParseDType(to_name);
    const std::vector<std::byte> in = CastInputs(from);
    const size_t from_size = SizeBytes(from), to_size = SizeBytes(to);
    REQUIRE(in.size() == static_cast<size_t>(count) * from_size);
    // 0: vectors; one element off: element by element; two columns: transposed.
    for (int form = 0; form < 3; ++form) {
      INFO(line << " form " << form);
      const uint64_t shift = form == 1 ? to_size : 0;
      const size_t out_bytes = static_cast<size_t>(count) * to_size + shift;
      Dims extent{count}, from_strides{1}, to_strides{1};
      if (form == 2) {
        extent = {count / 2, 2};
        from_strides = {2, 1};
        to_strides = {1, count / 2};
      }
      BoxTableBuilder builder({in.size(), out_bytes}, 0);
      Must(builder.AddCopy({0, 0, from, extent, from_strides}, {1, shift, to, extent, to_strides},
                           nullptr, 0));
      BoxTable table = Must(BoxTable::Create(std::move(builder).Finish(), kDevice, stream.ref()));
      DigestWords words = Must(DigestWords::Create(kDevice, 0));
      const DeviceBuffer source = Uploaded(in, stream);
      const DeviceBuffer target = Uploaded(std::vector<std::byte>(out_bytes), stream);
      std::byte* const bases[] = {source.data(), target.data()};
      Must(table.SetBases(bases, stream.ref()));
      Run(table, 0, 1, words, 0, stream);
      const std::vector<std::byte> out = Downloaded(target, stream);
      uint64_t sum = 0;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = form == 2 ? i % 2 * (count / 2) + i / 2 : i;
        uint32_t bits = 0;
        std::memcpy(&bits, out.data() + shift + static_cast<size_t>(at) * to_size, to_size);
        sum += bits * Mix64(static_cast<uint64_t>(i));
      }
      CHECK(sum == expected);
    }
    ++casts;
  }
  CHECK(casts == 6);
}

TEST_CASE("a box outside its ranges is reported and nothing of it is written") {
  const Stream stream = Must(Stream::Create(kDevice));
  const std::vector<std::byte> in = RandomBytes(1 << 16);
  // A good box, then one that is broken after the host's checks, in each of the kernels.
  struct Form {
    DType dtype;
    Dims strides;
  };
  for (const Form& form : {Form{DType::kBFloat16, {64, 1}}, Form{DType::kBFloat16, {1, 64}},
                           Form{DType::kBFloat16, {130, 2}}}) {
    for (const bool wrong_range : {false, true}) {
      BoxTableBuilder builder({in.size(), 1 << 16}, 2);
      const host::DigestPosition position{5, {64, 64}, {0, 0}};
      const RangeBlock from{0, 0, form.dtype, {64, 64}, {64, 1}};
      Must(builder.AddCopy(from, {1, 0, form.dtype, {64, 64}, form.strides}, &position, 0));
      Must(builder.AddCopy(from, {1, 32768, form.dtype, {64, 64}, form.strides}, &position, 1));
      BoxImage image = std::move(builder).Finish();
      int broken = 0;
      for (BoxImage::Section& section : image.sections) {
        if (section.boxes.empty()) continue;
        REQUIRE(section.boxes.size() == 2);
        BoxDesc& box = section.boxes[1];
        if (wrong_range) {
          box.to_range = 9;
        } else {
          box.dims[box.num_dims - 1].to = uint64_t{1} << 40;
        }
        ++broken;
      }
      REQUIRE(broken == 1);
      BoxTable table = Must(BoxTable::Create(image, kDevice, stream.ref()));
      DigestWords words = Must(DigestWords::Create(kDevice, 2));
      const DeviceBuffer source = Uploaded(in, stream);
      const DeviceBuffer target = Uploaded(std::vector<std::byte>(size_t{1} << 16, kGuard), stream);
      std::byte* const bases[] = {source.data(), target.data()};
      Must(table.SetBases(bases, stream.ref()));
      Run(table, 0, 1, words, 0, stream);
      const auto read = words.Read();
      REQUIRE_FALSE(read.ok());
      CHECK(read.status().code() == StatusCode::kInternal);
      CHECK(Message(read.status()).find("box=1") != std::string::npos);
      const std::vector<std::byte> out = Downloaded(target, stream);
      CHECK(out[0] == in[0]);
      CHECK(std::all_of(out.begin() + 32768, out.end(), [](std::byte b) { return b == kGuard; }));
    }
  }
}

TEST_CASE("boxes beyond four gigabytes land where they belong") {
  const Stream stream = Must(Stream::Create(kDevice));
  constexpr int64_t kRows = 310000, kColumns = 4096;
  constexpr uint64_t kBytes = uint64_t{kRows} * kColumns * 2, kOffset = uint64_t{5} << 30;
  std::vector<std::byte> in(kBytes);
  for (size_t i = 0; i < kBytes; i += 8) {
    const uint64_t bits = (i + 1) * 0x9e3779b97f4a7c15ULL;
    std::memcpy(in.data() + i, &bits, 8);
  }
  const host::DigestPosition position{1, {kRows, kColumns}, {0, 0}};
  const RangeBlock from{0, 0, DType::kBFloat16, {kRows, kColumns}, {kColumns, 1}};
  const RangeBlock to{1, kOffset, DType::kBFloat16, {kRows, kColumns}, {kColumns, 1}};
  BoxTableBuilder builder({kBytes, kOffset + kBytes}, 2);
  Must(builder.AddCopy(from, to, &position, 0));
  builder.EndWindow();
  Must(builder.AddDigest(to, position, 1));
  BoxTable table = Must(BoxTable::Create(std::move(builder).Finish(), kDevice, stream.ref()));
  DigestWords words = Must(DigestWords::Create(kDevice, 2));
  const DeviceBuffer source = Uploaded(in, stream);
  const DeviceBuffer target = Must(DeviceBuffer::Create(kDevice, kOffset + kBytes));
  std::byte* const bases[] = {source.data(), target.data()};
  Must(table.SetBases(bases, stream.ref()));
  Run(table, 0, 2, words, 0, stream);
  const host::ConstBlock block{in.data(), DType::kBFloat16, {kRows, kColumns}, {kColumns, 1}};
  const uint64_t expected = host::DigestBlock(host::BestKernels(), block, position);
  const auto read = Must(words.Read());
  CHECK(read[0] == expected);
  CHECK(read[1] == expected);
  std::vector<std::byte> out(kBytes);
  Must(target.Download(out.data(), kBytes, kOffset, stream.ref()));
  Must(stream.Synchronize());
  CHECK(std::memcmp(out.data(), in.data(), kBytes) == 0);
}

}  // namespace weightd::cuda
