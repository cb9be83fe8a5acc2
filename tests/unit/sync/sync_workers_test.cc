// A sync with several workers: who does what, and what becomes of it when one of them fails.
#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <thread>

#include "tests/unit/sync/sync_fixture.h"

namespace weightd {
namespace {

using Strings = std::vector<std::string>;
using Devices = std::set<std::string>;

Strings Sorted(Strings list) {
  std::sort(list.begin(), list.end());
  return list;
}

// Actors on host and host.1; engine e0 on host, e1 on host.2.
Scene TwoEngines() {
  return {.engines = 2, .actor_devices = {"host", "host.1"}, .engine_devices = {"host", "host.2"}};
}

TEST_CASE("each source's worker copies its part and the engine's own verifies the sum") {
  SyncFixture fixture({.actor_devices = {"host", "host.1"}, .engine_devices = {"host.2"}});
  const SyncReport report = fixture.Sync(1);
  REQUIRE(report.error.ok());
  CHECK(Sorted(fixture.worker_log) == Strings{"plan", "plan host.1", "plan host.2", "transfer",
                                              "transfer host.1", "verify host.2"});
  CHECK(fixture.outcomes == Strings{"engine e0: committed"});
  CHECK(report.bytes == 16);
  fixture.worker_log.clear();
  REQUIRE(fixture.Sync(2).error.ok());
  CHECK(Sorted(fixture.worker_log) == Strings{"transfer", "transfer host.1", "verify host.2"});
}

TEST_CASE("a worker that skips its part shows in the sum") {
  SyncFixture fixture({.actor_devices = {"host", "host.1"}});
  fixture.script.on_step = [&](const std::string& device, const StepCommand& command) {
    fixture.StepDone(device, command,
                     command.step == Step::kVerify ? 42
                     : device == "host"            ? 42
                                                   : 1);
  };
  CHECK(FieldsOf(fixture.Sync(1).error).reason == reason::kVerifyMismatch);
  CHECK(fixture.outcomes == Strings{"engine e0: POISONED"});
}

TEST_CASE("words that belong to other tensors do not add up") {
  SyncFixture fixture({.actor_devices = {"host", "host.1"}});
  fixture.script.on_step = [&](const std::string& device, const StepCommand& command) {
    if (device == "host") return fixture.StepDone(device, command);
    Event event{.kind = Event::Kind::kStepDone,
                .device = device,
                .attempt = command.attempt,
                .step = command.step};
    event.touched = true;
    event.digests = {{0, {}, {21}}};
    fixture.mailbox.Post(std::move(event));
  };
  const SyncReport report = fixture.Sync(1);
  CHECK(FieldsOf(report.error).reason == reason::kPlanMismatch);
  CHECK(FieldsOf(report.error).peer.starts_with("worker host"));
}

TEST_CASE("a worker of trainer ranks that dies in the transfer fails all replicas and is named") {
  SyncFixture fixture(TwoEngines());
  fixture.script.on_step = [&](const std::string& device, const StepCommand& command) {
    if (device != "host.1") return fixture.StepDone(device, command);
    if (command.attempt.counter == 1) fixture.LoseWorker(device);
  };
  const SyncReport report = fixture.Sync(1);
  CHECK(FieldsOf(report.error).reason == reason::kWorkerLost);
  CHECK(FieldsOf(report.error).peer == "worker host.1");
  CHECK(FieldsOf(report.error).phase == "transfer");
  CHECK(fixture.outcomes == Strings{"engine e0: POISONED", "engine e1: POISONED"});
  CHECK(fixture.workers_killed.empty());
}

TEST_CASE("a worker that only verifies one engine takes no other engine down") {
  SyncFixture fixture(TwoEngines());
  fixture.script.on_step = [&](const std::string& device, const StepCommand& command) {
    if (device == "host.2") return fixture.LoseWorker(device);
    fixture.StepDone(device, command);
  };
  const SyncReport report = fixture.Sync(1, 1);
  REQUIRE(report.error.ok());
  CHECK(report.replicas[0].committed);
  CHECK_FALSE(report.replicas[1].committed);
  CHECK(FieldsOf(report.replicas[1].error).peer == "worker host.2");
  CHECK(FieldsOf(report.replicas[1].error).phase == "verify");
}

TEST_CASE("a replica that needs a worker that is away fails alone, before anything is written") {
  SyncFixture fixture(TwoEngines());
  fixture.workers_down = {"host.2"};
  const SyncReport report = fixture.Sync(1, 1);
  REQUIRE(report.error.ok());
  CHECK(report.replicas[0].committed);
  CHECK(FieldsOf(report.replicas[1].error).peer == "worker host.2");
  CHECK(FieldsOf(report.replicas[1].error).phase == "build_plan");
  CHECK(fixture.outcomes == Strings{"engine e0: committed"});
}

TEST_CASE("a frozen worker is named at the deadline and is the only one killed") {
  SyncFixture fixture({.actor_devices = {"host", "host.1"}, .engine_devices = {"host.2"}});
  fixture.script.on_step = [&](const std::string& device, const StepCommand& command) {
    if (device != "host.1") fixture.StepDone(device, command);
  };
  const SyncReport report = fixture.Sync(1);
  CHECK(report.error.code() == StatusCode::kDeadlineExceeded);
  CHECK(FieldsOf(report.error).peer == "worker host.1");
  CHECK(fixture.workers_killed == Devices{"host.1"});
  CHECK(fixture.outcomes == Strings{"engine e0: POISONED"});
}

TEST_CASE("progress of one worker does not hide that another is frozen") {
  SyncFixture fixture({.actor_devices = {"host", "host.1"}});
  fixture.script.on_step = [&](const std::string& device, const StepCommand& command) {
    if (device == "host") fixture.StepDone(device, command);
  };
  std::jthread progress([&](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      fixture.mailbox.Post(
          {.kind = Event::Kind::kProgress, .device = "host", .attempt = {1, 1}, .bytes = 1});
      std::this_thread::sleep_for(milliseconds(20));
    }
  });
  const auto start = Clock::now();
  const SyncReport report = fixture.Sync(1);
  CHECK(FieldsOf(report.error).peer == "worker host.1");
  CHECK(Clock::now() - start < std::chrono::seconds(20));
}

TEST_CASE("the report waits for every worker that was asked to write") {
  SyncFixture fixture({.actor_devices = {"host", "host.1"}});
  std::jthread late;
  std::atomic<bool> answered{false};
  fixture.script.on_step = [&](const std::string& device, const StepCommand& command) {
    if (device == "host") {
      return fixture.StepDone(device, command, 0,
                              Error(StatusCode::kUnavailable, reason::kPeerLost, "", "gone"));
    }
    late = std::jthread([&fixture, &answered, device, command] {
      std::this_thread::sleep_for(milliseconds(100));
      answered = true;
      fixture.StepDone(device, command);
    });
  };
  const SyncReport report = fixture.Sync(1);
  CHECK(FieldsOf(report.error).reason == reason::kPeerLost);
  CHECK(answered);
  CHECK(fixture.workers_killed.empty());
  CHECK(std::count(fixture.worker_log.begin(), fixture.worker_log.end(), "cancel host.1") == 1);
}

TEST_CASE("a replica is untouched only if every worker says so") {
  for (const bool second : {false, true}) {
    SyncFixture fixture({.actor_devices = {"host", "host.1"}});
    fixture.script.on_step = [&](const std::string& device, const StepCommand& command) {
      Event event{.kind = Event::Kind::kStepDone,
                  .device = device,
                  .attempt = command.attempt,
                  .step = command.step,
                  .touched = device == "host.1" && second};
      event.status = Error(StatusCode::kUnavailable, reason::kPeerLost, "", "gone");
      fixture.mailbox.Post(std::move(event));
    };
    REQUIRE_FALSE(fixture.Sync(1).error.ok());
    CHECK(fixture.outcomes == Strings{second ? "engine e0: POISONED" : "engine e0: untouched"});
  }
}

TEST_CASE("one worker with another plan stops the sync before it writes") {
  SyncFixture fixture({.actor_devices = {"host", "host.1"}});
  fixture.script.on_plan = [](const std::string& device, Digest128 digest) {
    if (device == "host.1") digest[0] ^= 1;
    return digest;
  };
  const SyncReport report = fixture.Sync(1);
  CHECK(FieldsOf(report.error).reason == reason::kPlanMismatch);
  CHECK(FieldsOf(report.error).peer == "worker host.1");
  CHECK(fixture.outcomes.empty());
}

TEST_CASE("memory must be lent to every worker that writes into it or verifies it") {
  SyncFixture fixture({.actor_devices = {"host", "host.1"}, .engine_devices = {"host.2"}});
  std::set<std::pair<MemberId, std::string>> asked;
  fixture.attached = [&](MemberId member, const std::string& device) {
    asked.emplace(member, device);
    return member != fixture.engine_members[0] || device != "host.1";
  };
  const SyncReport report = fixture.Sync(1);
  CHECK(report.error.code() == StatusCode::kDeadlineExceeded);
  CHECK(FieldsOf(report.error).peer == "engine e0");
  const MemberId engine = fixture.engine_members[0];
  CHECK(asked == std::set<std::pair<MemberId, std::string>>{{static_cast<MemberId>(1), "host"},
                                                            {static_cast<MemberId>(2), "host.1"},
                                                            {engine, "host"},
                                                            {engine, "host.1"},
                                                            {engine, "host.2"}});
  CHECK(fixture.outcomes.empty());
}

TEST_CASE("replicas on several devices are compared by the words of their workers") {
  for (const uint64_t word : {7u, 8u}) {
    SyncFixture fixture({.actor_devices = {"host", "host.1"}, .replicated = true});
    fixture.script.on_step = [&](const std::string& device, const StepCommand& command) {
      if (command.step != Step::kCheckReplicas) {
        const bool writes = command.step == Step::kTransfer && device == "host.1";
        return fixture.StepDone(device, command, writes ? 0 : 42);
      }
      Event event{.kind = Event::Kind::kStepDone,
                  .device = device,
                  .attempt = command.attempt,
                  .step = command.step,
                  .shard_words = {device == "host" ? 7 : word}};
      fixture.mailbox.Post(std::move(event));
    };
    const SyncReport report = fixture.Sync(1, 0, true);
    CHECK(report.error.ok() == (word == 7));
    if (word == 7) continue;
    const ErrorFields fields = FieldsOf(report.error);
    CHECK(fields.reason == reason::kReplicasDiffer);
    CHECK(fields.tensor == "w");
    CHECK(fields.rank == "actor 1");
    CHECK(fixture.outcomes.empty());
  }
}

TEST_CASE("a worker that does not send its words fails the comparison") {
  SyncFixture fixture({.actor_devices = {"host", "host.1"}, .replicated = true});
  const SyncReport report = fixture.Sync(1, 0, true);
  CHECK(FieldsOf(report.error).reason == reason::kProtocol);
  CHECK(FieldsOf(report.error).peer == "worker host");
}

}  // namespace
}  // namespace weightd
