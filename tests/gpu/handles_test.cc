#include <catch2/catch.hpp>
#include <utility>
#include <vector>

#include "daemon/device/cuda/buffer.h"
#include "daemon/device/cuda/cuda_status.h"
#include "daemon/device/cuda/device.h"
#include "daemon/device/cuda/event.h"
#include "daemon/device/cuda/stream.h"
#include "tests/gpu/gpu_testing.h"

namespace weightd::cuda {

TEST_CASE("owners move and leave nothing behind") {
  Stream stream = Must(Stream::Create(kDevice, true));
  const StreamRef ref = stream.ref();
  Stream moved = std::move(stream);
  CHECK(stream.ref() == nullptr);
  CHECK(moved.ref() == ref);
  DeviceBuffer a = Must(DeviceBuffer::Create(kDevice, 1000));
  DeviceBuffer b = Must(DeviceBuffer::Create(kDevice, 2000));
  a = std::move(b);
  CHECK(a.size_bytes() == 2000);
  CHECK(reinterpret_cast<uintptr_t>(a.data()) % 256 == 0);
  CHECK(Must(DeviceBuffer::Create(kDevice, 0)).data() == nullptr);
  PinnedBuffer pinned = Must(PinnedBuffer::Create(kDevice, 4096));
  pinned.data()[4095] = std::byte{1};
  CHECK(PinnedBuffer(std::move(pinned)).data()[4095] == std::byte{1});
}

TEST_CASE("an event orders two streams and tells when it is done") {
  const Stream first = Must(Stream::Create(kDevice)), second = Must(Stream::Create(kDevice));
  const Event begin = Must(Event::Create(kDevice, Event::Kind::kTiming));
  const Event end = Must(Event::Create(kDevice, Event::Kind::kTiming));
  CHECK(Must(begin.Done()));
  DeviceBuffer buffer = Must(DeviceBuffer::Create(kDevice, 1 << 28));
  Must(begin.Record(first.ref()));
  for (int i = 0; i < 20; ++i) Must(buffer.Clear(first.ref()));
  Must(end.Record(first.ref()));
  Must(second.Wait(end.ref()));
  std::vector<std::byte> bytes(1 << 20, std::byte{7});
  Must(buffer.Download(bytes.data(), bytes.size(), 0, second.ref()));
  Must(second.Synchronize());
  CHECK(Must(end.Done()));
  CHECK(bytes == std::vector<std::byte>(1 << 20));
  CHECK(Must(end.SecondsSince(begin)) > 0);
}

TEST_CASE("errors name what failed and what to do") {
  const auto refused = DeviceBuffer::Create(kDevice, uint64_t{1} << 50);
  REQUIRE_FALSE(refused.ok());
  CHECK(refused.status().code() == StatusCode::kResourceExhausted);
  CHECK(FieldsOf(refused.status()).reason == reason::kGpuMemory);
  CHECK(Message(refused.status()).find("1125899906842624") != std::string::npos);
  CHECK(FieldsOf(NumMultiprocessors(DeviceId{4711}).status()).reason == reason::kDevice);
  CHECK(Must(NumMultiprocessors(kDevice)) > 0);
  CHECK(FromCuda(0, "nothing").ok());
  CHECK(CheckAvailable().ok());
}

}  // namespace weightd::cuda
