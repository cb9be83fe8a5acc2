// A sync whose bytes go over a wire: when it is opened, used again, given up, and what is refused.
#include <algorithm>
#include <catch2/catch.hpp>

#include "tests/unit/sync/sync_fixture.h"

namespace weightd {
namespace {

using Strings = std::vector<std::string>;

constexpr char kGpu0[] = "GPU-00000000-1111-2222-3333-444444444444";
constexpr char kGpu1[] = "GPU-00000000-1111-2222-3333-555555555555";

// Actors on host and host.1, the engine on host.2: everything goes over the wire.
Scene Wired() {
  return {.actor_devices = {"host", "host.1"}, .engine_devices = {"host.2"}, .wire = true};
}

ptrdiff_t Count(const SyncFixture& fixture, const std::string& entry) {
  return std::count(fixture.worker_log.begin(), fixture.worker_log.end(), entry);
}

TEST_CASE("a wire is opened by all its workers once and used again") {
  SyncFixture fixture(Wired());
  REQUIRE(fixture.Sync(1).error.ok());
  CHECK(Count(fixture, "make wire") == 1);
  for (const char* entry : {"open wire", "open wire host.1", "open wire host.2"}) {
    CHECK(Count(fixture, entry) == 1);
  }
  // Sources send, the engine's own worker receives: all three transfer, one verifies.
  for (const char* entry : {"transfer", "transfer host.1", "transfer host.2", "verify host.2"}) {
    CHECK(Count(fixture, entry) == 1);
  }
  REQUIRE(fixture.Sync(2).error.ok());
  CHECK(Count(fixture, "make wire") == 1);
  CHECK(Count(fixture, "open wire") == 1);
  CHECK(fixture.wires_used == std::vector<uint64_t>(6, 1));
}

TEST_CASE("a worker that sends needs no memory of the engine") {
  SyncFixture fixture(Wired());
  const MemberId engine = fixture.engine_members[0];
  fixture.attached = [&](MemberId member, const std::string& device) {
    return member != engine || device == "host.2";
  };
  CHECK(fixture.Sync(1).error.ok());
}

TEST_CASE("a wire that cannot be opened fails the replica before anything is written") {
  SyncFixture fixture(Wired());
  fixture.script.on_open_wire = [&](const std::string& device, const WireOffer& offer) {
    if (device != "host.1") return;  // the others wait for it
    fixture.WireReady(device, offer.wire,
                      Error(StatusCode::kResourceExhausted, reason::kGpuMemory, "", "full"));
  };
  const SyncReport report = fixture.Sync(1);
  CHECK(FieldsOf(report.error).reason == reason::kGpuMemory);
  CHECK(FieldsOf(report.error).peer == "worker host.1");
  CHECK(FieldsOf(report.error).phase == "build_plan");
  CHECK(fixture.outcomes.empty());
  CHECK(Count(fixture, "close wire host.2") == 1);
  fixture.script.on_open_wire = nullptr;
  REQUIRE(fixture.Sync(1).error.ok());
  CHECK(fixture.wires_used == std::vector<uint64_t>(3, 2));
}

TEST_CASE("a worker that does not join in time is named") {
  SyncFixture fixture(Wired());
  fixture.script.on_open_wire = [&](const std::string& device, const WireOffer& offer) {
    if (device != "host.1") fixture.WireReady(device, offer.wire);
  };
  const SyncReport report = fixture.Sync(1);
  CHECK(FieldsOf(report.error).reason == reason::kDeadline);
  CHECK(FieldsOf(report.error).peer == "worker host.1");
}

TEST_CASE("a worker that dies in a transfer costs the wire, and the next sync opens another") {
  SyncFixture fixture(Wired());
  fixture.script.on_step = [&](const std::string& device, const StepCommand& command) {
    if (device == "host.1" && command.attempt.counter == 1) return fixture.LoseWorker(device);
    if (device == "host.2" && command.attempt.counter == 1) {  // waits for it: aborts when told
      return fixture.StepDone(device, command, 0,
                              Error(StatusCode::kCancelled, reason::kCancelled, "", "aborted"));
    }
    fixture.StepDone(device, command);
  };
  const SyncReport report = fixture.Sync(1);
  CHECK(FieldsOf(report.error).reason == reason::kWorkerLost);
  CHECK(FieldsOf(report.error).peer == "worker host.1");
  CHECK(fixture.outcomes == Strings{"engine e0: POISONED"});
  CHECK(fixture.wires.empty());
  CHECK(Count(fixture, "close wire host.2") == 1);
  REQUIRE(fixture.Sync(2).error.ok());
  CHECK(fixture.wires_used == std::vector<uint64_t>{1, 1, 1, 2, 2, 2});
}

TEST_CASE("workers with different versions of NCCL are refused before any of them joins") {
  SyncFixture fixture({.actor_devices = {kGpu0, kGpu0}, .engine_devices = {kGpu1}, .wire = true});
  fixture.facts[kGpu0].nccl_version = 22703;
  fixture.facts[kGpu1].nccl_version = 22809;
  const Status error = fixture.Sync(1).error;
  CHECK(FieldsOf(error).reason == reason::kNcclVersion);
  CHECK(Message(error).find("22703 on " + std::string(kGpu0)) != std::string::npos);
  CHECK(Message(error).find("22809 on " + std::string(kGpu1)) != std::string::npos);
  CHECK(Count(fixture, "make wire " + std::string(kGpu0)) == 0);
  CHECK(fixture.outcomes.empty());
  fixture.facts[kGpu1].nccl_version = 0;
  fixture.facts[kGpu1].nccl_problem = "libnccl.so.2 is missing";
  const Status missing = fixture.Sync(1).error;
  CHECK(FieldsOf(missing).reason == reason::kNoPath);
  CHECK(Message(missing).find("libnccl.so.2 is missing") != std::string::npos);
  fixture.facts[kGpu1].nccl_version = 22703;
  CHECK(fixture.Sync(1).error.ok());
}

}  // namespace
}  // namespace weightd
