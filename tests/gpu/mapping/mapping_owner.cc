// The process that owns GPU memory in mapping_test.cc: allocates it as a framework might, lends it
// through the client library's own code, and says what it holds when asked.
//
//   mapping_owner KIND    socket on descriptor 3
//
// After the frames of a registration (or one DataRefused) it answers single bytes: 'r' with 'y' if
// the memory holds what the test wrote, 'q' by leaving.
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "client/src/cuda_fence.h"
#include "client/src/pages.h"
#include "client/src/registration.h"
#include "daemon/wire/convert.h"
#include "daemon/wire/data_channel.h"
#include "tests/gpu/mapping/driver_more.h"
#include "tests/gpu/mapping/mapping_pattern.h"

namespace weightd::testing {
namespace {

constexpr int kSocket = 3;

/// Memory made of pieces, as torch's expandable segments are.
cuda::DevicePtr MapPieces(const cuda::Driver& driver, const MoreDriver& more, size_t count,
                          int handle_types) {
  cuda::DevicePtr base = 0;
  WEIGHTD_CHECK(driver.MemAddressReserve(&base, count * kPieceBytes, 0, 0, 0) == 0);
  cuda::AllocationProperties properties;
  properties.type = 1;  // pinned
  properties.handle_types = handle_types;
  properties.location = {cuda::kLocationDevice, 0};
  for (size_t i = 0; i < count; ++i) {
    cuda::AllocationHandle handle = 0;
    WEIGHTD_CHECK(more.MemCreate(&handle, kPieceBytes, &properties, 0) == 0);
    WEIGHTD_CHECK(driver.MemMap(base + i * kPieceBytes, kPieceBytes, 0, handle, 0) == 0);
    WEIGHTD_CHECK(driver.MemRelease(handle) == 0);
  }
  const cuda::AccessDescription access{{cuda::kLocationDevice, 0}, cuda::kAccessReadWrite};
  WEIGHTD_CHECK(driver.MemSetAccess(base, count * kPieceBytes, &access, 1) == 0);
  return base;
}

cuda::DevicePtr Allocate(const std::string& kind, const cuda::Driver& driver,
                         const MoreDriver& more) {
  cuda::DevicePtr base = 0;
  const size_t bytes = kElements * 4 + kOffsetBytes;
  if (kind == "whole") WEIGHTD_CHECK(more.MemAlloc(&base, bytes) == 0);
  if (kind == "pool") WEIGHTD_CHECK(more.MemAllocAsync(&base, bytes, nullptr) == 0);
  if (kind == "pieces") base = MapPieces(driver, more, kPieces, cuda::kHandlePosixFd);
  if (kind == "hidden") base = MapPieces(driver, more, kPieces, 0);
  WEIGHTD_CHECK(base != 0);
  return base + kOffsetBytes;
}

StatusOr<ActorRegistration> Register(cuda::DevicePtr address) {
  weightd_shard shard{};
  shard.extent[0] = kElements;
  shard.memory.space = WEIGHTD_SPACE_CUDA;
  shard.memory.fd = -1;
  shard.memory.address = reinterpret_cast<const void*>(address);
  shard.memory.strides[0] = 1;
  weightd_tensor tensor{};
  tensor.name = "w";
  tensor.dtype = 1;
  tensor.num_dims = 1;
  tensor.shape[0] = kElements;
  tensor.num_shards = 1;
  tensor.shards = &shard;
  return ReadTensors({&tensor, 1});
}

void Send(DataChannel* channel, const v1::DataFrame& frame, const std::vector<int>& fds) {
  WEIGHTD_CHECK(channel->Send(frame, Clock::now() + milliseconds(5000), fds).ok());
}

int Serve(const std::string& kind) {
  const StatusOr<const cuda::Driver*> driver = cuda::LoadDriver();
  WEIGHTD_CHECK(driver.ok());
  const MoreDriver more = LoadMoreDriver();
  CUctx_st* context = nullptr;
  WEIGHTD_CHECK((*driver)->DevicePrimaryCtxRetain(&context, 0) == 0);
  WEIGHTD_CHECK((*driver)->CtxPushCurrent(context) == 0);
  const cuda::DevicePtr address = Allocate(kind, **driver, more);
  std::vector<uint32_t> content(kElements);
  for (size_t i = 0; i < kElements; ++i) content[i] = Pattern(i);
  WEIGHTD_CHECK(more.MemcpyHtoD(address, content.data(), kElements * 4) == 0);

  DataChannel channel{ScopedFd(kSocket)};
  v1::DataFrame frame;
  StatusOr<ActorRegistration> registration = Register(address);
  if (!registration.ok()) {
    *frame.mutable_refused()->mutable_error() = ToProto(registration.status());
    Send(&channel, frame, {});
    return 0;
  }
  StatusOr<CudaFence> fence = CudaFence::Create(registration->segments.cuda().ordinal());
  WEIGHTD_CHECK(fence.ok() && fence->Record(nullptr).ok());
  for (const SegmentFrame& part : SegmentFrames(registration->segments, fence->handle())) {
    *frame.mutable_segments() = part.offer;
    Send(&channel, frame, part.fds);
  }
  for (const v1::BindMemory& page : ActorBindings(*registration)) {
    *frame.mutable_bind() = page;
    Send(&channel, frame, {});
  }
  for (char question = 0; ::read(STDIN_FILENO, &question, 1) == 1 && question == 'r';) {
    WEIGHTD_CHECK((*driver)->MemcpyDtoH(content.data(), address, kElements * 4) == 0);
    bool same = registration->segments.cuda().CheckAlive().ok();
    for (size_t i = 0; i < kElements; ++i) same = same && content[i] == Pattern(i) + 1;
    WEIGHTD_CHECK(::write(STDOUT_FILENO, same ? "y" : "n", 1) == 1);
  }
  return 0;
}

}  // namespace
}  // namespace weightd::testing

int main(int argc, char** argv) { return argc == 2 ? weightd::testing::Serve(argv[1]) : 2; }
