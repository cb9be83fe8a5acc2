#include "daemon/worker/ring.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstring>
#include <vector>

namespace weightd {
namespace {

/// Bytes of the ring's memory object that hold pages.
uint64_t AllocatedBytes(const Ring& ring) {
  struct stat info {};
  REQUIRE(::fstat(ring.fd(), &info) == 0);
  return static_cast<uint64_t>(info.st_blocks) * 512;
}

void FillByClient(const Ring& ring, int value) {
  void* client = ::mmap(nullptr, kRingBytes, PROT_READ | PROT_WRITE, MAP_SHARED, ring.fd(), 0);
  REQUIRE(client != MAP_FAILED);
  std::memset(client, value, kRingBytes);
  ::munmap(client, kRingBytes);
}

TEST_CASE("what a client writes into a ring is seen by the worker") {
  const StatusOr<std::shared_ptr<Ring>> ring = Ring::Create();
  REQUIRE(ring.ok());
  FillByClient(**ring, 0x5a);
  CHECK((*ring)->base()[0] == std::byte{0x5a});
  CHECK((*ring)->base()[kRingBytes - 1] == std::byte{0x5a});
}

TEST_CASE("a client cannot change the size of a ring") {
  const StatusOr<std::shared_ptr<Ring>> ring = Ring::Create();
  REQUIRE(ring.ok());
  CHECK(::ftruncate((*ring)->fd(), 0) != 0);
  CHECK(::ftruncate((*ring)->fd(), kRingBytes * 2) != 0);
}

TEST_CASE("an untouched ring costs no memory") {
  const StatusOr<std::shared_ptr<Ring>> ring = Ring::Create();
  REQUIRE(ring.ok());
  CHECK(AllocatedBytes(**ring) == 0);
}

TEST_CASE("all rings together stay below the staging bound, however many there are") {
  StagingBudget budget;
  std::vector<std::shared_ptr<Ring>> rings;
  for (int i = 0; i < 12; ++i) {
    StatusOr<std::shared_ptr<Ring>> ring = Ring::Create();
    REQUIRE(ring.ok());
    rings.push_back(*std::move(ring));
    budget.Use(rings.back());
    FillByClient(*rings.back(), i + 1);
    uint64_t allocated = 0;
    for (const auto& other : rings) allocated += AllocatedBytes(*other);
    CHECK(allocated <= kStagingBytes);
    CHECK(allocated <= budget.resident_bytes());
  }
  CHECK(AllocatedBytes(*rings[0]) == 0);
  CHECK(rings[11]->base()[0] == std::byte{12});
  budget.Use(rings[0]);
  CHECK(AllocatedBytes(*rings[4]) == 0);  // now the one used longest ago
  CHECK(rings[5]->base()[0] == std::byte{6});
}

TEST_CASE("a ring that is gone leaves the budget") {
  StagingBudget budget;
  {
    const StatusOr<std::shared_ptr<Ring>> gone = Ring::Create();
    REQUIRE(gone.ok());
    budget.Use(*gone);
    CHECK(budget.resident_bytes() == kRingBytes);
  }
  const StatusOr<std::shared_ptr<Ring>> ring = Ring::Create();
  REQUIRE(ring.ok());
  budget.Use(*ring);
  CHECK(budget.resident_bytes() == kRingBytes);
}

}  // namespace
}  // namespace weightd
