// Every way in which a safetensors header can lie.
#include "client/checkpoint/safetensors.h"

#include <catch2/catch.hpp>

#include "tests/unit/checkpoint/checkpoint_testing.h"

namespace weightd {
namespace {

using test::CheckRefused;
using test::File;

StatusOr<std::vector<StoredTensor>> Read(const std::string& file) {
  return ReadSafetensors(file, "dir/a.safetensors");
}

// A header with one entry called "w", or two.
std::string Entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape +
         ",\"data_offsets\":" + offsets + "}";
}

std::string One(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return "{" + Entry("w", dtype, shape, offsets) + "}";
}

TEST_CASE("a sound file gives its tensors in the order of their data") {
  const std::string header =
      R"({"__metadata__":{"format":"pt"},)" + Entry("b", "F32", "[2,3]", "[4,28]") + "," +
      Entry("a", "BF16", "[2]", "[0,4]") + "," + Entry("scalar", "I64", "[]", "[28,36]") + "," +
      Entry("empty", "F16", "[0,7]", "[28,28]") + "}   ";
  const auto tensors = Read(File(header, 36));
  INFO(tensors.status().ToString());
  REQUIRE(tensors.ok());
  REQUIRE(tensors->size() == 4);
  const uint64_t data = 8 + header.size();
  CHECK((*tensors)[0].info == TensorInfo{"a", {2}, DType::kBFloat16});
  CHECK((*tensors)[0].begin == data);
  CHECK((*tensors)[1].info == TensorInfo{"b", {2, 3}, DType::kFloat32});
  CHECK((*tensors)[1].begin == data + 4);
  CHECK((*tensors)[1].size_bytes == 24);
  CHECK((*tensors)[2].info == TensorInfo{"empty", {0, 7}, DType::kFloat16});
  CHECK((*tensors)[3].info == TensorInfo{"scalar", {}, DType::kInt64});
}

TEST_CASE("every dtype that weightd carries is known, every other is refused by name") {
  const std::pair<const char*, DType> known[] = {
      {"F64", DType::kFloat64},        {"F32", DType::kFloat32},
      {"F16", DType::kFloat16},        {"BF16", DType::kBFloat16},
      {"I64", DType::kInt64},          {"I32", DType::kInt32},
      {"I16", DType::kInt16},          {"I8", DType::kInt8},
      {"U8", DType::kUInt8},           {"F8_E4M3", DType::kFloat8E4M3FN},
      {"F8_E5M2", DType::kFloat8E5M2}, {"BOOL", DType::kBool}};
  for (const auto& [name, dtype] : known) {
    const size_t size = SizeBytes(dtype);
    const auto tensors = Read(File(One(name, "[1]", "[0," + std::to_string(size) + "]"), size));
    INFO(name);
    REQUIRE(tensors.ok());
    CHECK((*tensors)[0].info.dtype == dtype);
  }
  for (const char* name : {"U16", "U32", "U64", "F8_E8M0", "F4", "f32", "", "C64"}) {
    CheckRefused(Read(File(One(name, "[1]", "[0,4]"), 4)).status(), reason::kDtype, "w",
                 "dtype that weightd does not carry: w");
  }
}

TEST_CASE("a truncated header and a length beyond the file are refused") {
  CheckRefused(Read("").status(), reason::kCheckpoint, "", "too short");
  CheckRefused(Read("1234567").status(), reason::kCheckpoint, "", "too short");
  CheckRefused(Read(File(3, "{}", 0)).status(), reason::kCheckpoint, "", "ends beyond the file");
  for (const uint64_t length : {uint64_t{1} << 63, ~uint64_t{0}, ~uint64_t{0} - 7}) {
    CheckRefused(Read(File(length, "{}", 100)).status(), reason::kCheckpoint, "",
                 "ends beyond the file");
  }
  const std::string whole = One("F32", "[1]", "[0,4]");
  CheckRefused(Read(File(whole.size() - 1, whole, 4)).status(), reason::kCheckpoint, "",
               "is not a JSON object");
  CheckRefused(Read(File(0, "", 4)).status(), reason::kCheckpoint, "", "is not a JSON object");
}

TEST_CASE("a header that is too long is refused before it is parsed") {
  const std::string file = File(std::string(kMostHeaderBytes + 1, ' '), 0);
  CheckRefused(Read(file).status(), reason::kCheckpoint, "", "too long");
}

TEST_CASE("bad UTF-8, bad JSON and depth are refused") {
  const char* bad[] = {"[]",          "7",        "{\"w\":",       "{}{}",
                       "{\"w\":1,}",  "nonsense", "{\"\xff\":{}}", "{\"a\xc3\":{}}",
                       "\xef\xbb\xbf"};
  for (const char* header : bad) {
    INFO(header);
    CheckRefused(Read(File(header, 0)).status(), reason::kCheckpoint, "", "is not a JSON object");
  }
  const std::string deep(1'000'000, '[');
  CheckRefused(Read(File("{\"w\":" + deep, 0)).status(), reason::kCheckpoint, "", "nested more");
}

TEST_CASE("a name that comes twice is refused, also within one entry") {
  const std::string entry = Entry("w", "F32", "[1]", "[0,4]");
  CheckRefused(Read(File("{" + entry + "," + entry + "}", 4)).status(), reason::kDuplicateTensor,
               "w", "names something twice");
  const std::string twice = R"({"w":{"dtype":"F32","shape":[1],"shape":[2],"data_offsets":[0,4]}})";
  CheckRefused(Read(File(twice, 4)).status(), reason::kDuplicateTensor, "shape", "twice");
}

TEST_CASE("an entry that is no tensor is refused") {
  const char* bad[] = {
      R"({"w":3})",
      R"({"w":{}})",
      R"({"w":{"dtype":"F32","shape":[1]}})",
      R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"scale":2}})",
      R"({"w":{"dtype":"F32","shape":[1],"offsets":[0,4]}})",
  };
  for (const char* header : bad) {
    INFO(header);
    CheckRefused(Read(File(header, 4)).status(), reason::kCheckpoint, "w", "a.safetensors");
  }
  CheckRefused(Read(File(R"({"":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4)).status(),
               reason::kCheckpoint, "", "not a name");
  const std::string nul = R"({"a\u0000b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})";
  CHECK(FieldsOf(Read(File(nul, 4)).status()).reason == reason::kCheckpoint);
}

TEST_CASE("offsets that are no range, or lie outside of the file, are refused") {
  for (const char* offsets : {"[4,0]", "[0]", "[0,4,8]", "[-4,0]", "[0.0,4.0]", "[\"0\",\"4\"]",
                              "[0,99999999999999999999]", "4", "null"}) {
    INFO(offsets);
    CheckRefused(Read(File(One("F32", "[1]", offsets), 4)).status(), reason::kCheckpoint, "w",
                 "are not [begin, end)");
  }
  CheckRefused(Read(File(One("F32", "[1]", "[4,8]"), 4)).status(), reason::kCheckpoint, "w",
               "lies outside of dir/a.safetensors");
  CheckRefused(
      Read(File(One("F32", "[1]", "[18446744073709551608,18446744073709551612]"), 4)).status(),
      reason::kCheckpoint, "w", "lies outside");
  CheckRefused(Read(File(One("F32", "[2]", "[0,8]"), 4)).status(), reason::kCheckpoint, "w",
               "lies outside");
}

TEST_CASE("a size that dtype and shape do not give is refused") {
  CheckRefused(Read(File(One("BF16", "[2]", "[0,8]"), 8)).status(), reason::kShape, "w",
               "another size");
  CheckRefused(Read(File(One("F32", "[3]", "[0,8]"), 8)).status(), reason::kShape, "w",
               "another size");
  CheckRefused(Read(File(One("F32", "[]", "[0,0]"), 0)).status(), reason::kShape, "w",
               "another size");
}

TEST_CASE("sizes of 2^63 and products that overflow are refused") {
  for (const char* shape :
       {"[9223372036854775808]", "[9223372036854775807]", "[4611686018427387904]",
        "[4294967296,4294967296]", "[2147483648,2147483648]", "[18446744073709551615]",
        "[18446744073709551616]", "[1e3]", "[-1]", "[4294967296,4294967296,0]", "[2.0]", "{}",
        "[1,1,1,1,1,1,1,1,1]", "[[1]]", "[null]"}) {
    INFO(shape);
    CheckRefused(Read(File(One("F32", shape, "[0,0]"), 0)).status(), reason::kShape, "w",
                 "cannot be");
  }
  // 2^61 elements are a shape, but no file has them.
  CheckRefused(Read(File(One("F64", "[2305843009213693952]", "[0,0]"), 0)).status(), reason::kShape,
               "w", "another size");
}

TEST_CASE("overlaps and holes are refused") {
  const auto two = [](const std::string& a, const std::string& b, size_t bytes) {
    return Read(File("{" + Entry("a", "U8", "[4]", a) + "," + Entry("b", "U8", "[4]", b) + "}",
                     bytes))
        .status();
  };
  CHECK(two("[0,4]", "[4,8]", 8).ok());
  CheckRefused(two("[0,4]", "[3,7]", 7), reason::kOverlap, "b", "overlap");
  CheckRefused(two("[0,4]", "[0,4]", 4), reason::kOverlap, "b", "overlap");
  CheckRefused(two("[0,4]", "[5,9]", 9), reason::kGap, "b", "hole of 1 bytes");
  CheckRefused(two("[1,5]", "[5,9]", 9), reason::kGap, "a", "hole of 1 bytes");
  CheckRefused(two("[0,4]", "[4,8]", 9), reason::kGap, "b", "1 bytes that belong to no tensor");
  CheckRefused(Read(File("{}", 1)).status(), reason::kGap, "", "belong to no tensor");
}

}  // namespace
}  // namespace weightd
