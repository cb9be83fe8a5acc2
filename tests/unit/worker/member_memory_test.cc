#include "daemon/worker/member_memory.h"

#include <unistd.h>

#include <catch2/catch.hpp>
#include <limits>

#include "tests/unit/worker/worker_testing.h"

namespace weightd {
namespace {

using testing::MakeBinding;
using testing::ReasonOf;
using testing::SharedBuffer;

HostSegmentMapper mapper;

Status Offer(MemoryRegistration* registration, uint32_t id, const SharedBuffer& buffer,
             uint64_t claimed_bytes) {
  v1::OfferSegments offer;
  offer.add_segments()->set_id(id);
  offer.mutable_segments(0)->set_size_bytes(claimed_bytes);
  std::vector<ScopedFd> fds;
  fds.push_back(buffer.Duplicate());
  return registration->Offer(offer, std::move(fds));
}

StatusOr<std::shared_ptr<const MemberMemory>> Bind(MemoryRegistration* registration,
                                                   const std::vector<v1::MemoryBinding>& bindings,
                                                   bool last = true) {
  v1::BindMemory page;
  for (const v1::MemoryBinding& binding : bindings) *page.add_bindings() = binding;
  page.set_last(last);
  return registration->Bind(page);
}

v1::MemoryBinding WithStrides(v1::MemoryBinding binding, const std::vector<int64_t>& strides) {
  binding.mutable_strides()->Add(strides.begin(), strides.end());
  return binding;
}

TEST_CASE("a registration over several pages finds every block") {
  const SharedBuffer buffer(4096);
  for (int i = 0; i < 1024; ++i) buffer.as<float>()[i] = static_cast<float>(i);
  MemoryRegistration registration(false, "actor 0", &mapper);
  REQUIRE(Offer(&registration, 3, buffer, 4096).ok());
  v1::MemoryBinding second_box = MakeBinding(1, 3, 256, {8}, v1::DTYPE_FLOAT32);
  second_box.set_box(1);
  auto page =
      Bind(&registration, {second_box, MakeBinding(1, 3, 128, {4, 2}, v1::DTYPE_FLOAT32)}, false);
  REQUIRE(page.ok());
  CHECK(*page == nullptr);
  page = Bind(&registration, {MakeBinding(0, 3, 0, {2, 3}, v1::DTYPE_FLOAT32)});
  REQUIRE(page.ok());
  const MemberMemory& memory = **page;
  CHECK(memory.mapped_bytes == 4096);
  REQUIRE(memory.Find(1, 1) != nullptr);
  CHECK(*reinterpret_cast<const float*>(memory.Find(1, 1)->binding.base) == 64.0f);
  REQUIRE(memory.Find(1, 0) != nullptr);
  CHECK(memory.Find(1, 0)->binding.strides == Dims{2, 1});
  CHECK(memory.Find(0, 0) != nullptr);
  CHECK(memory.Find(0, 1) == nullptr);
  CHECK(memory.Find(2, 0) == nullptr);
}

TEST_CASE("blocks that leave their segment are refused, overflow included") {
  const SharedBuffer buffer(4096);
  MemoryRegistration registration(true, "engine e0 tp 0", &mapper);
  REQUIRE(Offer(&registration, 0, buffer, 4096).ok());
  const int64_t huge = int64_t{1} << 61;
  const std::vector<v1::MemoryBinding> refused = {
      MakeBinding(0, 0, 4, {1024}, v1::DTYPE_FLOAT32),
      MakeBinding(0, 0, 4096, {1}, v1::DTYPE_FLOAT32),
      MakeBinding(0, 0, std::numeric_limits<uint64_t>::max() - 3, {1}, v1::DTYPE_FLOAT32),
      MakeBinding(0, 0, 0, {huge}, v1::DTYPE_FLOAT64),
      WithStrides(MakeBinding(0, 0, 0, {2, 2}, v1::DTYPE_FLOAT32), {huge, huge}),
      WithStrides(MakeBinding(0, 0, 0, {3}, v1::DTYPE_FLOAT32),
                  {std::numeric_limits<int64_t>::max()}),
      WithStrides(MakeBinding(0, 0, 64, {2}, v1::DTYPE_FLOAT32), {-1}),
      WithStrides(MakeBinding(0, 0, 0, {2, 2}, v1::DTYPE_FLOAT32), {1}),
      MakeBinding(0, 0, 0, {-1}, v1::DTYPE_FLOAT32),
      MakeBinding(0, 0, 0, std::vector<int64_t>(9, 1), v1::DTYPE_FLOAT32),
  };
  for (const v1::MemoryBinding& binding : refused) {
    CAPTURE(binding.ShortDebugString());
    const Status status = Bind(&registration, {binding}).status();
    CHECK(ReasonOf(status) == reason::kShape);
    CHECK(FieldsOf(status).tensor == "index 0 box 0");
    CHECK_FALSE(FieldsOf(status).remedy.empty());
  }
  CHECK(Bind(&registration, {MakeBinding(0, 0, 0, {1024}, v1::DTYPE_FLOAT32)}).ok());
}

TEST_CASE("unknown segments and dtypes, misaligned and doubled blocks are refused") {
  const SharedBuffer buffer(4096);
  MemoryRegistration registration(false, "actor 0", &mapper);
  REQUIRE(Offer(&registration, 0, buffer, 4096).ok());
  const auto good = MakeBinding(0, 0, 0, {4}, v1::DTYPE_FLOAT32);
  CHECK(ReasonOf(Bind(&registration, {MakeBinding(0, 9, 0, {4}, v1::DTYPE_FLOAT32)}).status()) ==
        reason::kMemoryMoved);
  CHECK(ReasonOf(Bind(&registration, {MakeBinding(0, 0, 2, {4}, v1::DTYPE_FLOAT32)}).status()) ==
        reason::kMemoryMoved);
  CHECK(
      ReasonOf(Bind(&registration, {MakeBinding(0, 0, 0, {4}, v1::DTYPE_UNSPECIFIED)}).status()) ==
      reason::kDtype);
  CHECK(ReasonOf(Bind(&registration, {MakeBinding(0, 0, 0, {4}, static_cast<v1::DType>(99))})
                     .status()) == reason::kDtype);
  CHECK(ReasonOf(Bind(&registration, {good, good}).status()) == reason::kDuplicateTensor);
  CHECK(Bind(&registration, {good}).ok());
}

TEST_CASE("an expanded view may be read but not written") {
  const SharedBuffer buffer(4096);
  const auto expanded = WithStrides(MakeBinding(0, 0, 0, {4, 8}, v1::DTYPE_FLOAT32), {0, 1});
  const auto transposed = WithStrides(MakeBinding(0, 0, 0, {4, 8}, v1::DTYPE_FLOAT32), {1, 4});
  MemoryRegistration actor(false, "actor 0", &mapper);
  REQUIRE(Offer(&actor, 0, buffer, 4096).ok());
  CHECK(Bind(&actor, {expanded}).ok());
  MemoryRegistration engine(true, "engine e0 tp 0", &mapper);
  REQUIRE(Offer(&engine, 0, buffer, 4096).ok());
  CHECK(ReasonOf(Bind(&engine, {expanded}).status()) == reason::kShape);
  CHECK(Bind(&engine, {transposed}).ok());
}

TEST_CASE("a segment that is smaller than claimed is refused") {
  const SharedBuffer buffer(4096);
  MemoryRegistration registration(false, "actor 0", &mapper);
  const Status status = Offer(&registration, 0, buffer, 8192);
  CHECK(ReasonOf(status) == reason::kSharedMemory);
  CHECK(ReasonOf(Offer(&registration, 0, buffer, 0)) == reason::kSharedMemory);
  v1::OfferSegments without_fd;
  without_fd.add_segments()->set_size_bytes(1);
  CHECK(ReasonOf(registration.Offer(without_fd, {})) == reason::kProtocol);
}

TEST_CASE("a segment that is offered again is not mapped again") {
  const SharedBuffer buffer(4096);
  const SharedBuffer other(4096);
  MemoryRegistration registration(false, "actor 0", &mapper);
  const auto binding = MakeBinding(0, 0, 0, {4}, v1::DTYPE_FLOAT32);
  REQUIRE(Offer(&registration, 0, buffer, 4096).ok());
  const auto first = Bind(&registration, {binding});
  REQUIRE(first.ok());
  REQUIRE(Offer(&registration, 0, buffer, 4096).ok());
  const auto second = Bind(&registration, {binding});
  REQUIRE(second.ok());
  CHECK((*first)->segments.at(0) == (*second)->segments.at(0));

  REQUIRE(Offer(&registration, 0, other, 4096).ok());
  const auto third = Bind(&registration, {binding});
  REQUIRE(third.ok());
  CHECK((*first)->segments.at(0) != (*third)->segments.at(0));
}

TEST_CASE("a registration unmaps segments that it no longer uses") {
  const SharedBuffer buffer(4096);
  MemoryRegistration registration(false, "actor 0", &mapper);
  REQUIRE(Offer(&registration, 0, buffer, 4096).ok());
  REQUIRE(Offer(&registration, 1, buffer, 4096).ok());
  REQUIRE(Bind(&registration, {MakeBinding(0, 0, 0, {4}, v1::DTYPE_FLOAT32)}).ok());
  CHECK(ReasonOf(Bind(&registration, {MakeBinding(0, 1, 0, {4}, v1::DTYPE_FLOAT32)}).status()) ==
        reason::kMemoryMoved);
}

TEST_CASE("memory that its owner truncates is noticed") {
  const SharedBuffer buffer(8192);
  MemoryRegistration registration(false, "actor 0", &mapper);
  REQUIRE(Offer(&registration, 0, buffer, 8192).ok());
  const auto memory = Bind(&registration, {MakeBinding(0, 0, 0, {2048}, v1::DTYPE_FLOAT32)});
  REQUIRE(memory.ok());
  CHECK((*memory)->CheckIntact(true).ok());
  REQUIRE(::ftruncate(buffer.fd(), 4096) == 0);
  CHECK((*memory)->CheckIntact(false).ok());
  const Status status = (*memory)->CheckIntact(true);
  CHECK(ReasonOf(status) == reason::kMemoryMoved);
  CHECK(Message(status).find("actor 0") != std::string::npos);
  const volatile std::byte* gone = (*memory)->Find(0, 0)->binding.base + 4096;
  CHECK(*gone == std::byte{0});  // survived, and from now on known without a look at the size
  CHECK(ReasonOf((*memory)->CheckIntact(false)) == reason::kMemoryMoved);
}

TEST_CASE("a worker of host memory refuses GPU memory, and descriptors must fit their segments") {
  const SharedBuffer buffer(4096);
  MemoryRegistration registration(false, "actor 0", &mapper);
  v1::OfferSegments offer;
  v1::Segment* segment = offer.add_segments();
  segment->set_size_bytes(4096);
  const auto offer_with = [&](int count) {
    std::vector<ScopedFd> fds;
    for (int i = 0; i < count; ++i) fds.push_back(buffer.Duplicate());
    return ReasonOf(registration.Offer(offer, std::move(fds)));
  };
  CHECK(offer_with(0) == reason::kProtocol);
  CHECK(offer_with(2) == reason::kProtocol);
  segment->set_kind(v1::SEGMENT_KIND_CUDA_IPC);
  segment->set_ipc_handle(std::string(64, 'x'));
  CHECK(offer_with(0) == reason::kDevice);
  segment->set_kind(v1::SEGMENT_KIND_CUDA_VMM);
  segment->add_piece_bytes(4096);
  CHECK(offer_with(0) == reason::kProtocol);
  CHECK(offer_with(1) == reason::kDevice);
  segment->set_kind(v1::SEGMENT_KIND_SHARED_MEMORY);
  offer.set_event(std::string(64, 'x'));
  CHECK(offer_with(1) == reason::kProtocol);
}

TEST_CASE("staged and empty blocks need no segment") {
  MemoryRegistration registration(false, "actor 0", &mapper);
  v1::MemoryBinding staged = MakeBinding(0, 0, 0, {1 << 20}, v1::DTYPE_FLOAT32);
  staged.set_staged(true);
  const auto memory =
      Bind(&registration, {staged, MakeBinding(1, 7, 0, {0, 4}, v1::DTYPE_FLOAT32)});
  REQUIRE(memory.ok());
  CHECK((*memory)->has_staged);
  CHECK((*memory)->Find(0, 0)->binding.staged);
  CHECK((*memory)->Find(1, 0)->binding.base == nullptr);
  CHECK((*memory)->mapped_bytes == 0);
}

}  // namespace
}  // namespace weightd
