#include "daemon/device/cuda/box_table.h"

#include <array>
#include <catch2/catch.hpp>
#include <cstring>
#include <string>
#include <vector>

#include "daemon/device/cuda/box_walk.h"
#include "daemon/device/host/float_bits.h"
#include "tests/gpu/box_workload.h"

namespace weightd::cuda {
namespace {

constexpr uint64_t kVectorBytes = 16;

uint64_t Cast(BoxKind kind, uint64_t bits) {
  const auto wide = static_cast<uint32_t>(bits);
  const auto narrow = static_cast<uint16_t>(bits);
  switch (kind) {
    case BoxKind::kFloat32ToBFloat16:
      return host::BFloat16FromFloat32(wide);
    case BoxKind::kFloat32ToFloat16:
      return host::Float16FromFloat32(wide);
    case BoxKind::kFloat16ToBFloat16:
      return host::BFloat16FromFloat32(host::Float32FromFloat16(narrow));
    case BoxKind::kBFloat16ToFloat16:
      return host::Float16FromFloat32(host::Float32FromBFloat16(narrow));
    case BoxKind::kFloat16ToFloat32:
      return host::Float32FromFloat16(narrow);
    case BoxKind::kBFloat16ToFloat32:
      return host::Float32FromBFloat16(narrow);
    case BoxKind::kZero:
      return 0;
    default:
      return bits;
  }
}

// Runs a table element by element, at the places that the kernels compute.
class Emulation {
 public:
  Emulation(const BoxImage& image, std::vector<std::byte> source, std::vector<std::byte> target)
      : image_(image),
        memory_{{std::move(source), std::move(target)}},
        ranges_{{{0, memory_[0].size()}, {0, memory_[1].size()}}},
        words_(image.num_words, 0) {}

  void RunWindow(uint32_t window) {
    for (int s = 0; s < kNumSections; ++s) {
      const BoxImage::Section& section = image_.sections[static_cast<size_t>(s)];
      const uint32_t begin = window == 0 ? 0 : section.window_end[window - 1];
      for (uint32_t tile = begin; tile < section.window_end[window]; ++tile) {
        const BoxDesc& box = section.boxes[section.box_of_tile[tile]];
        REQUIRE(Inside(box, ranges_.data(), 2));
        if (s == kTilesSection) {
          RunTile(box, tile - box.first_tile);
        } else {
          RunUnits(box, tile - box.first_tile, s >= kVectorsSection);
        }
      }
    }
  }
  const std::vector<std::byte>& target() const { return memory_[1]; }
  const std::vector<uint64_t>& words() const { return words_; }

 private:
  void RunUnits(const BoxDesc& box, uint32_t tile, bool vectors) {
    const uint32_t begin = tile * box.units_per_tile;
    REQUIRE(begin < box.units);
    REQUIRE(box.units_per_tile % (32 / box.lanes) == 0);
    const BoxDim& fast = box.dims[0];
    for (uint32_t u = begin; u < std::min(box.units, begin + box.units_per_tile); ++u) {
      const UnitPlace place = PlaceOfUnit(box, u);
      REQUIRE(place.count > 0);
      if (vectors) CheckVectors(box, place);
      for (uint32_t i = 0; i < place.count; ++i) {
        RunElement(box, place.from + i * fast.from, place.to + i * fast.to,
                   place.row + i * fast.row, place.column + i * fast.column);
      }
    }
  }

  // What the vector kernels take for granted.
  static void CheckVectors(const BoxDesc& box, const UnitPlace& place) {
    const uint64_t size = UnitSize(box);
    REQUIRE(place.count * size % kVectorBytes == 0);
    if (box.from_size != 0) {
      REQUIRE((box.from_offset + place.from) %
                  std::min(kVectorBytes, kVectorBytes / size * box.from_size) ==
              0);
    }
    if (box.to_size != 0) REQUIRE((box.to_offset + place.to) % kVectorBytes == 0);
    if (!box.digest) return;
    const uint64_t in_block = place.column * size % kDigestBlockBytes;
    REQUIRE(in_block % kVectorBytes == 0);
    REQUIRE(in_block + place.count * size <= kDigestBlockBytes);
    REQUIRE((box.dims[0].column == 1 || box.dims[0].extent == 1));
  }

  void RunTile(const BoxDesc& box, uint32_t tile) {
    REQUIRE(tile < box.units);
    const TilePlace place = PlaceOfTile(box, tile);
    REQUIRE((place.p_count > 0 && place.q_count > 0));
    const BoxDim& p = box.dims[0];
    const BoxDim& q = box.dims[1];
    for (uint32_t i = 0; i < place.p_count; ++i) {
      for (uint32_t j = 0; j < place.q_count; ++j) {
        RunElement(box, place.from + i * p.from + j * q.from, place.to + i * p.to + j * q.to,
                   place.row + i * p.row + j * q.row, place.column + i * p.column + j * q.column);
      }
    }
  }

  void RunElement(const BoxDesc& box, uint64_t from, uint64_t to, uint64_t row, uint64_t column) {
    uint64_t bits = 0;
    if (box.from_size != 0) {
      std::memcpy(&bits, memory_[box.from_range].data() + box.from_offset + from, box.from_size);
    }
    bits = Cast(box.kind, bits);
    if (box.to_size != 0) {
      std::memcpy(memory_[box.to_range].data() + box.to_offset + to, &bits, box.to_size);
    }
    uint64_t& word = words_[box.word];
    if (box.kind == BoxKind::kZero || box.kind == BoxKind::kZeroCheck) {
      word += 1 + (bits != 0 ? box.key : 0);
    }
    if (!box.digest) return;
    const unsigned size = UnitSize(box);
    const uint64_t byte = column * size;
    const uint64_t at = byte % kDigestBlockBytes;
    const uint64_t term = size < 8 ? ElementTerm(static_cast<uint32_t>(bits), size, at)
                                   : ElementTerm(static_cast<uint32_t>(bits), 4, at) +
                                         ElementTerm(static_cast<uint32_t>(bits >> 32), 4, at + 4);
    word += RowWeightOfKey(box.key, row, byte / kDigestBlockBytes) * term;
  }

  const BoxImage& image_;
  std::array<std::vector<std::byte>, 2> memory_;
  std::array<MemoryRange, 2> ranges_;
  std::vector<uint64_t> words_;
};

const RangeBlock kRow{0, 0, DType::kFloat32, {4, 8}, {8, 1}};

}  // namespace

TEST_CASE("a table does with every element what the host path does") {
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    INFO("seed " << seed);
    const BoxWorkload workload(seed, 60);
    Emulation emulation(workload.image(), workload.source(), workload.target());
    for (uint32_t w = 0; w < workload.image().num_windows(); ++w) emulation.RunWindow(w);
    REQUIRE(emulation.target() == workload.expected());
    for (size_t i = 0; i < workload.words().size(); ++i) {
      INFO("box " << i);
      REQUIRE(emulation.words()[i] == workload.words()[i]);
    }
  }
}

TEST_CASE("a model's boxes go to the vector kernels, one descriptor each") {
  BoxTableBuilder builder({1 << 20, 1 << 20}, 4);
  const host::DigestPosition whole{3, {64, 1536}, {0, 0}};
  const RangeBlock from{0, 0, DType::kFloat32, {64, 1536}, {1536, 1}};
  const RangeBlock to{1, 4096, DType::kBFloat16, {64, 1536}, {1536, 1}};
  REQUIRE(builder.AddCopy(from, to, &whole, 0).ok());
  REQUIRE(builder.AddCopy(from, to, nullptr, 0).ok());
  REQUIRE(builder.AddDigest(to, whole, 1).ok());
  builder.EndWindow();
  const BoxImage image = std::move(builder).Finish();
  CHECK(image.num_windows() == 1);
  const auto& casts =
      image.sections[kVectorsSection + static_cast<size_t>(BoxKind::kFloat32ToBFloat16)];
  REQUIRE(casts.boxes.size() == 2);
  CHECK(casts.boxes[0].parts == 1);
  CHECK(casts.boxes[0].num_dims == 2);
  CHECK(casts.boxes[1].num_dims == 1);  // without a digest, all of it is one run
  CHECK(image.sections[kVectorsSection + static_cast<size_t>(BoxKind::kDigest)].boxes.size() == 1);
  CHECK(image.sections[kElementsSection].boxes.empty());
}

TEST_CASE("a table refuses what its ranges do not hold") {
  BoxTableBuilder builder({128, 64}, 1);
  const RangeBlock to{1, 0, DType::kBFloat16, {4, 8}, {8, 1}};
  const host::DigestPosition position{0, {4, 8}, {0, 0}};
  const auto code = [&](const RangeBlock& from, const RangeBlock& target) {
    return FieldsOf(builder.AddCopy(from, target, &position, 0)).reason;
  };
  CHECK(builder.AddCopy(kRow, to, &position, 0).ok());
  RangeBlock bad = to;
  bad.offset_bytes = 2;
  CHECK(code(kRow, bad) == reason::kShape);
  bad = to;
  bad.offset_bytes = 1;
  CHECK(code(kRow, bad) == reason::kShape);
  bad = to;
  bad.range = 2;
  CHECK(code(kRow, bad) == reason::kShape);
  bad = to;
  bad.strides = {4, 1};  // overlaps itself
  CHECK(code(kRow, bad) == reason::kShape);
  bad = to;
  bad.extent = {4, 7};
  CHECK(code(kRow, bad) == reason::kShape);
  bad = to;
  bad.dtype = DType::kInt32;
  CHECK(code(kRow, bad) == reason::kDtype);
  RangeBlock far = kRow;
  far.strides = {INT64_MAX, 1};
  CHECK(code(far, to) == reason::kShape);
  CHECK_FALSE(builder.AddDigest(kRow, position, 1).ok());
  const BoxImage image = std::move(builder).Finish();
  CHECK(image.num_windows() == 1);
}

TEST_CASE("a descriptor outside its ranges is seen without overflow") {
  BoxDesc box;
  box.from_size = 4;
  box.num_dims = 2;
  box.dims[0] = {8, 1, 4, 0, 0};
  box.dims[1] = {4, 0, 32, 0, 1};
  const auto inside = [&](uint64_t bytes) {
    const MemoryRange range{0, bytes};
    return Inside(box, &range, 1);
  };
  CHECK(inside(128));
  CHECK_FALSE(inside(127));
  box.from_offset = ~uint64_t{0} - 3;
  CHECK_FALSE(inside(128));
  box.from_offset = 0;
  for (const uint64_t stride : {uint64_t{33}, uint64_t{1} << 62, ~uint64_t{0}, uint64_t{1} << 33}) {
    box.dims[1].from = stride;
    CHECK_FALSE(inside(128));
  }
  box.dims[1] = {~0U, 0, uint64_t{1} << 32, 0, 1};
  CHECK_FALSE(inside((uint64_t{1} << 62) - 1));
  box.from_range = 1;
  box.dims[1] = {1, 0, 0, 0, 0};
  CHECK_FALSE(inside(128));
}

TEST_CASE("a copy engine is offered runs at a fixed pitch and nothing else") {
  const RangeBlock rows{0, 0, DType::kBFloat16, {4, 8}, {8, 1}};
  const RangeBlock narrowed{1, 0, DType::kBFloat16, {4, 8}, {20, 1}};
  const auto one = AsPitchedCopy(rows, rows);
  REQUIRE(one.has_value());
  CHECK((one->rows == 1 && one->row_bytes == 64));
  const auto pitched = AsPitchedCopy(rows, narrowed);
  REQUIRE(pitched.has_value());
  CHECK((pitched->rows == 4 && pitched->row_bytes == 16));
  CHECK((pitched->from_pitch == 16 && pitched->to_pitch == 40));
  const RangeBlock turned{1, 0, DType::kBFloat16, {4, 8}, {1, 4}};
  CHECK_FALSE(AsPitchedCopy(rows, turned).has_value());
  RangeBlock cast = rows;
  cast.dtype = DType::kFloat16;
  CHECK_FALSE(AsPitchedCopy(rows, cast).has_value());
  const RangeBlock deep{0, 0, DType::kBFloat16, {2, 4, 8}, {100, 20, 1}};
  CHECK_FALSE(AsPitchedCopy(deep, deep).has_value());
  const RangeBlock scalar{0, 0, DType::kInt64, {}, {}};
  CHECK(AsPitchedCopy(scalar, scalar)->row_bytes == 8);
}

}  // namespace weightd::cuda
