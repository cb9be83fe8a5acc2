// Staged shards: what clients copy into their ring because it cannot be lent.
#include <sys/mman.h>

#include <catch2/catch.hpp>
#include <thread>

#include "daemon/wire/convert.h"
#include "tests/unit/worker/worker_fixture.h"

namespace weightd {
namespace {

using testing::FakeClient;
using testing::kActor0;
using testing::kToken;
using testing::ReasonOf;
using testing::SmallPlan;
using Fixture = testing::WorkerFixture;

/// Answers every RingFill of actor 0 from `source`, whose rows are of `columns` floats.
void ServeFills(FakeClient* client, int ring_fd, const float* source, Status answer) {
  void* ring = ::mmap(nullptr, kRingBytes, PROT_READ | PROT_WRITE, MAP_SHARED, ring_fd, 0);
  while (true) {
    const v1::DataFrame frame = client->Next();
    if (frame.has_ready()) continue;
    if (!frame.has_fill()) break;
    const Box part = *FromProto(frame.fill().part());
    const int64_t columns = 4;
    float* out = static_cast<float*>(ring);
    if (part.num_dims() == 1) {
      for (int64_t i = 0; i < part.extent[0]; ++i) *out++ = source[16 + part.origin[0] + i];
    } else {
      for (int64_t r = 0; r < part.extent[0]; ++r) {
        for (int64_t c = 0; c < part.extent[1]; ++c) {
          *out++ = source[(part.origin[0] + r) * columns + part.origin[1] + c];
        }
      }
    }
    v1::DataFrame reply;
    *reply.mutable_filled()->mutable_attempt() = frame.fill().attempt();
    if (!answer.ok()) *reply.mutable_filled()->mutable_error() = ToProto(answer);
    if (!client->channel().Send(reply, testing::Soon()).ok()) break;
  }
  ::munmap(ring, kRingBytes);
}

/// Actor 0 has no memory to lend: its shards go through the ring.
std::unique_ptr<FakeClient> AttachStaged(Fixture* fixture, ScopedFd* ring) {
  auto client = std::make_unique<FakeClient>(fixture->path, kActor0, kToken, true);
  REQUIRE(client->Next().has_attached());
  REQUIRE(client->fds().size() == 1);
  *ring = std::move(client->fds()[0]);
  std::vector<v1::MemoryBinding> bindings = fixture->ActorBindings();
  for (v1::MemoryBinding& binding : bindings) binding.set_staged(true);
  client->Bind(bindings);
  REQUIRE(fixture->reports.TakeLost(kActor0).has_value());
  REQUIRE(fixture->reports.TakeAttached(kActor0).has_value());
  return client;
}

TEST_CASE("staged shards arrive through the ring") {
  Fixture fixture;
  fixture.AttachAll();
  fixture.Load(SmallPlan());
  ScopedFd ring;
  const auto client = AttachStaged(&fixture, &ring);
  std::jthread server(
      [&] { ServeFills(client.get(), ring.get(), fixture.shard(0), absl::OkStatus()); });
  const v1::StepDone done = fixture.Run(v1::STEP_TRANSFER);
  INFO(done.error().message());
  CHECK(done.error().code() == 0);
  CHECK(fixture.Run(v1::STEP_CHECK_REPLICAS).error().code() == 0);
  const v1::StepDone verified = fixture.Run(v1::STEP_VERIFY);
  CHECK(done.digests(0).SerializeAsString() == verified.digests(0).SerializeAsString());
  for (int i = 0; i < 32; ++i) CHECK(fixture.EngineW(i) == fixture.shard(i / 16)[i % 16]);
  client->channel().Shutdown();
}

TEST_CASE("a client's refusal to fill fails the step with the client's own reason") {
  Fixture fixture;
  fixture.AttachAll();
  fixture.Load(SmallPlan());
  ScopedFd ring;
  const auto client = AttachStaged(&fixture, &ring);
  const Status refusal = Error(StatusCode::kFailedPrecondition, reason::kMemoryMoved,
                               "pass the tensor to sync", "tensor has no memory");
  std::jthread server([&] { ServeFills(client.get(), ring.get(), fixture.shard(0), refusal); });
  const v1::StepDone done = fixture.Run(v1::STEP_TRANSFER);
  CHECK(ReasonOf(done.error()) == reason::kMemoryMoved);
  CHECK(done.error().peer() == "actor 0");
  client->channel().Shutdown();
}

TEST_CASE("a client that never fills is a deadline, and one that dies a lost peer") {
  Fixture fixture;
  fixture.AttachAll();
  fixture.Load(SmallPlan());
  ScopedFd ring;
  auto client = AttachStaged(&fixture, &ring);
  fixture.Start(v1::STEP_TRANSFER, {}, 1, 20'000);
  const v1::StepDone late = fixture.Done();
  CHECK(ReasonOf(late.error()) == reason::kDeadline);
  fixture.Start(v1::STEP_TRANSFER);
  while (client->Next().frame_case() != v1::DataFrame::kFill) continue;
  client.reset();
  const v1::StepDone dead = fixture.Done();
  CHECK(ReasonOf(dead.error()) == reason::kPeerLost);
  CHECK(dead.error().peer() == "actor 0");
  CHECK(fixture.reports.TakeLost(kActor0).has_value());
}

}  // namespace
}  // namespace weightd
