// Verification beside the transfer: when it starts, what it is told, and what becomes of it.
#include <catch2/catch.hpp>

#include "tests/unit/sync/sync_fixture.h"

namespace weightd {
namespace {

using Strings = std::vector<std::string>;
using Devices = std::set<std::string>;

// Actors on host and host.1, the engine on host.2, whose worker can verify beside the transfer.
struct Following : SyncFixture {
  explicit Following(std::vector<uint32_t> stages = {})
      : SyncFixture({.actor_devices = {"host", "host.1"},
                     .engine_devices = {"host.2"},
                     .stages = std::move(stages)}) {
    facts["host.2"].follows = true;
    sync_options.verify_when = VerifyWhen::kBeside;
  }
  // The log without plans.
  Strings Steps() const {
    Strings steps;
    for (const std::string& entry : worker_log) {
      if (!entry.starts_with("plan")) steps.push_back(entry);
    }
    return steps;
  }
};

TEST_CASE("a worker verifies beside the transfer and is not asked again") {
  Following fixture;
  REQUIRE(fixture.Sync(1).error.ok());
  CHECK(fixture.Steps() ==
        Strings{"transfer", "transfer host.1", "follow host.2", "landed 0 all host.2"});
  CHECK(fixture.outcomes == Strings{"engine e0: committed"});
}

TEST_CASE("a host, and whoever is told so, verifies after the transfer") {
  for (const VerifyWhen when : {VerifyWhen::kAuto, VerifyWhen::kAfter}) {
    Following fixture;
    fixture.sync_options.verify_when = when;
    REQUIRE(fixture.Sync(1).error.ok());
    CHECK(fixture.Steps() == Strings{"transfer", "transfer host.1", "verify host.2"});
  }
}

TEST_CASE("a GPU verifies large rounds beside the transfer, with a worker that can") {
  const std::string gpu = "GPU-12345678-1234-1234-1234-123456789abc";
  for (const bool large : {true, false}) {
    for (const bool follows : {true, false}) {
      const Scene scene = {.actor_devices = {"host", "host"},
                           .engine_devices = {gpu},
                           .elements = large ? int64_t{1} << 30 : 4};
      SyncFixture fixture(scene);
      fixture.facts[gpu].follows = follows;
      REQUIRE(fixture.Sync(1).error.ok());
      CHECK(fixture.worker_log.back() == (large && follows ? "landed 0 all " : "verify ") + gpu);
    }
  }
}

TEST_CASE("every round has its own verification") {
  Following fixture({2});
  REQUIRE(fixture.Sync(1).error.ok());
  CHECK(fixture.Steps() == Strings{"transfer", "transfer host.1", "follow host.2",
                                   "landed 0 all host.2", "engine e0 converts 1", "transfer+1",
                                   "transfer+1 host.1", "follow+1 host.2", "landed 0 all host.2"});
}

TEST_CASE("the verifying worker is told the least of all who write, and never less than before") {
  Following fixture;
  fixture.script.on_step = [&](const std::string& device, const StepCommand& command) {
    if (device == "host") fixture.Landed(device, command, 3);
    if (device != "host.1") return;
    fixture.Landed(device, command, 5);
    fixture.Landed("host", command, 7);
    fixture.Landed(device, command, 4);
    StepCommand other = command;
    other.round = 1;
    fixture.Landed(device, other, 6);
    other = command;
    other.attempt.counter += 5;
    fixture.Landed(device, other, 6);
    other = command;
    other.targets = {9};
    fixture.Landed(device, other, 6);
    fixture.Landed("host.2", command, 6);  // which stores nothing
    fixture.StepDone("host", command);
    fixture.StepDone(device, command);
  };
  REQUIRE(fixture.Sync(1).error.ok());
  CHECK(fixture.Steps() == Strings{"transfer", "transfer host.1", "follow host.2",
                                   "landed 0 3 host.2", "landed 0 5 host.2",
                                   "landed 0 all host.2"});
}

TEST_CASE("a verification beside the transfer that finds other bytes poisons the engine") {
  Following fixture;
  fixture.script.on_landed = [&](const std::string& device, const LandedMark& mark) {
    fixture.StepDone(device, {.attempt = mark.attempt, .step = Step::kVerify}, 41);
  };
  const SyncReport report = fixture.Sync(1);
  CHECK(FieldsOf(report.error).reason == reason::kVerifyMismatch);
  CHECK(FieldsOf(report.error).phase == "verify");
  CHECK(fixture.outcomes == Strings{"engine e0: POISONED"});
}

TEST_CASE("a writer that freezes is named, not the worker that waits for it") {
  Following fixture;
  fixture.script.on_step = [&](const std::string& device, const StepCommand& command) {
    if (device == "host") fixture.StepDone(device, command);
  };
  const SyncReport report = fixture.Sync(1);
  CHECK(report.error.code() == StatusCode::kDeadlineExceeded);
  CHECK(FieldsOf(report.error).peer == "worker host.1");
  CHECK(FieldsOf(report.error).phase == "transfer");
  // Both are told to stop, and the fence waits for both.
  CHECK(fixture.workers_killed == Devices{"host.1", "host.2"});
  CHECK(fixture.outcomes == Strings{"engine e0: POISONED"});
}

TEST_CASE("a failed transfer cancels the verification beside it and waits for its end") {
  Following fixture;
  StepCommand follow;
  fixture.script.on_step = [&](const std::string& device, const StepCommand& command) {
    if (command.follows) follow = command;
    if (device == "host") {
      fixture.StepDone(device, command, 0, Error(StatusCode::kInternal, "X", "", "broken"));
    }
    if (device == "host.1") fixture.StepDone(device, command);
  };
  fixture.script.on_cancel = [&](const std::string& device) {
    if (device == "host.2") {
      fixture.StepDone(device, follow, 0, Error(StatusCode::kCancelled, "CANCELLED", "", "ended"));
    }
  };
  const SyncReport report = fixture.Sync(1);
  CHECK(FieldsOf(report.error).reason == "X");
  CHECK(fixture.workers_killed.empty());
  CHECK(fixture.outcomes == Strings{"engine e0: POISONED"});
}

TEST_CASE("a worker that dies while it verifies beside the transfer fails the engine at once") {
  Following fixture;
  fixture.script.on_step = [&](const std::string& device, const StepCommand& command) {
    if (command.follows) return fixture.LoseWorker(device);
    fixture.StepDone(device, command);
  };
  const SyncReport report = fixture.Sync(1);
  CHECK(FieldsOf(report.error).reason == reason::kWorkerLost);
  CHECK(FieldsOf(report.error).peer == "worker host.2");
  CHECK(fixture.outcomes == Strings{"engine e0: POISONED"});
}

}  // namespace
}  // namespace weightd
