#include "daemon/device/mapping.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace weightd {
namespace {

ScopedFd MakeObject(int64_t size_bytes, bool seal) {
  ScopedFd fd(memfd_create("mapping_test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  REQUIRE(fd.valid());
  REQUIRE(ftruncate(fd.get(), size_bytes) == 0);
  if (seal) REQUIRE(fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK) == 0);
  return fd;
}

StatusOr<Mapping> Map(const ScopedFd& fd, uint64_t size_bytes, Mapping::Access access) {
  return Mapping::Create(ScopedFd(dup(fd.get())), size_bytes, access, "actor 2 segment 7");
}

}  // namespace

TEST_CASE("two mappings of one object share bytes") {
  const ScopedFd fd = MakeObject(10000, true);
  auto writer = Map(fd, 10000, Mapping::Access::kWrite);
  auto reader = Map(fd, 9000, Mapping::Access::kRead);
  REQUIRE((writer.ok() && reader.ok()));
  writer->data()[8999] = std::byte{42};
  CHECK(reader->data()[8999] == std::byte{42});
  CHECK(reader->size_bytes() == 9000);
  CHECK_FALSE(reader->writable());
  const Mapping moved = std::move(*writer);
  CHECK(writer->data() == nullptr);
  CHECK(moved.data()[8999] == std::byte{42});
  CHECK(moved.CheckIntact().ok());
}

TEST_CASE("an object smaller than claimed is refused with both sizes") {
  const ScopedFd fd = MakeObject(4096, false);
  const auto mapping = Map(fd, 4097, Mapping::Access::kRead);
  REQUIRE_FALSE(mapping.ok());
  CHECK(mapping.status().code() == StatusCode::kInvalidArgument);
  CHECK(FieldsOf(mapping.status()).reason == reason::kSharedMemory);
  CHECK(Message(mapping.status()).find("actor 2 segment 7") != std::string::npos);
  CHECK(Message(mapping.status()).find("4097") != std::string::npos);
  CHECK_FALSE(FieldsOf(mapping.status()).remedy.empty());
}

TEST_CASE("what is not a memory object, or not writable, is refused") {
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  const ScopedFd read_end(ends[0]), write_end(ends[1]);
  CHECK_FALSE(Map(read_end, 100, Mapping::Access::kRead).ok());
  CHECK_FALSE(Map(ScopedFd(), 100, Mapping::Access::kRead).ok());
  const ScopedFd fd = MakeObject(4096, false);
  CHECK_FALSE(Map(fd, 0, Mapping::Access::kRead).ok());
  const std::string path = "/proc/self/fd/" + std::to_string(fd.get());
  const ScopedFd read_only(open(path.c_str(), O_RDONLY));
  REQUIRE(read_only.valid());
  CHECK(Map(read_only, 4096, Mapping::Access::kRead).ok());
  const auto refused = Map(read_only, 4096, Mapping::Access::kWrite);
  CHECK(FieldsOf(refused.status()).reason == reason::kSharedMemory);
}

TEST_CASE("a truncated object is reported and touching it does not kill the process") {
  for (const bool write : {false, true}) {
    const ScopedFd fd = MakeObject(1 << 20, false);
    auto mapping = Map(fd, 1 << 20, write ? Mapping::Access::kWrite : Mapping::Access::kRead);
    REQUIRE(mapping.ok());
    CHECK(mapping->CheckIntact().ok());
    REQUIRE(ftruncate(fd.get(), 4096) == 0);
    CHECK(FieldsOf(mapping->CheckIntact()).reason == reason::kMemoryMoved);
    if (write) mapping->data()[500000] = std::byte{1};
    CHECK(mapping->data()[700000] == std::byte{0});
    // Growing back does not bring the lender's bytes back.
    REQUIRE(ftruncate(fd.get(), 1 << 20) == 0);
    const Status lost = mapping->CheckIntact();
    CHECK(lost.code() == StatusCode::kUnavailable);
    CHECK(Message(lost).find("actor 2 segment 7") != std::string::npos);
  }
}

TEST_CASE("a sealed object needs no further checks") {
  const ScopedFd fd = MakeObject(8192, true);
  const auto mapping = Map(fd, 8192, Mapping::Access::kRead);
  REQUIRE(mapping.ok());
  CHECK(ftruncate(fd.get(), 4096) != 0);
  CHECK(mapping->CheckIntact().ok());
}

TEST_CASE("many mappings come and go") {
  const ScopedFd fd = MakeObject(4096, true);
  std::vector<Mapping> mappings;
  for (int i = 0; i < 1500; ++i) {
    auto mapping = Map(fd, 4096, Mapping::Access::kRead);
    if (!mapping.ok()) break;  // the descriptor limit of this machine
    mappings.push_back(std::move(*mapping));
  }
  CHECK(mappings.size() > 100);
  mappings.clear();
  CHECK(Map(fd, 4096, Mapping::Access::kRead).ok());
}

TEST_CASE("a block is checked against its segment without overflow") {
  const auto inside = [](uint64_t segment, uint64_t offset, const Dims& extent, const Dims& strides,
                         bool exclusive) {
    return CheckBlockInside(segment, offset, extent, strides, 2, exclusive).ok();
  };
  CHECK(inside(48, 0, {4, 6}, {6, 1}, true));
  CHECK(inside(48, 0, {4, 6}, {1, 4}, true));
  CHECK_FALSE(inside(47, 0, {4, 6}, {6, 1}, true));
  CHECK_FALSE(inside(48, 2, {4, 6}, {6, 1}, true));
  CHECK(inside(50, 2, {4, 6}, {6, 1}, true));
  CHECK(inside(2, 0, {}, {}, true));
  CHECK_FALSE(inside(2, 4, {}, {}, true));
  CHECK(inside(0, 100, {0, 6}, {6, 1}, true));  // nothing is touched
  CHECK(inside(48, 0, {4, 6}, {0, 1}, false));
  CHECK_FALSE(inside(48, 0, {4, 6}, {0, 1}, true));
  CHECK_FALSE(inside(48, 0, {4, 6}, {3, 1}, true));
  CHECK_FALSE(inside(48, 0, {4, 6}, {-6, 1}, false));
  CHECK_FALSE(inside(48, 0, {4}, {6, 1}, false));
  CHECK_FALSE(inside(~uint64_t{0}, 8, {INT64_MAX, INT64_MAX}, {INT64_MAX, 1}, false));
  CHECK_FALSE(inside(100, ~uint64_t{0} - 3, {4}, {1}, false));
}

}  // namespace weightd
