#include "daemon/sync/sync_session.h"

#include <catch2/catch.hpp>

#include "tests/unit/sync/sync_fixture.h"

namespace weightd {
namespace {

using Strings = std::vector<std::string>;

TEST_CASE("a sync runs every phase in order and acknowledges what it verified") {
  SyncFixture fixture;
  const SyncReport report = fixture.Sync(1);
  REQUIRE(report.error.ok());
  CHECK(fixture.worker_log == Strings{"plan", "transfer", "verify"});
  CHECK(fixture.outcomes == Strings{"engine e0: committed"});
  CHECK(fixture.replicas[0]->state == ReplicaState::kServing);
  CHECK(report.bytes == 16);
  std::vector<Phase> phases;
  for (const auto& [phase, micros] : report.phases) phases.push_back(phase);
  CHECK(phases == std::vector<Phase>{Phase::kAdmit, Phase::kResolveLayouts, Phase::kBuildPlan,
                                     Phase::kPrepare, Phase::kTransfer, Phase::kVerify,
                                     Phase::kCommit, Phase::kReport});
  CHECK(report.pause_us > 0);
  for (const auto& actor : fixture.actors) CHECK(actor->report->error.ok());
}

TEST_CASE("the second sync replays the plan without sending it again") {
  SyncFixture fixture;
  REQUIRE(fixture.Sync(1).error.ok());
  fixture.worker_log.clear();
  REQUIRE(fixture.Sync(2).error.ok());
  CHECK(fixture.worker_log == Strings{"transfer", "verify"});
}

TEST_CASE("bytes that differ after landing are never acknowledged and poison the engine") {
  SyncFixture fixture;
  fixture.script.on_step = [&](const std::string& device, const StepCommand& command) {
    fixture.StepDone(device, command, command.step == Step::kTransfer ? 42 : 43);
  };
  const SyncReport report = fixture.Sync(1);
  CHECK(FieldsOf(report.error).reason == reason::kVerifyMismatch);
  CHECK(FieldsOf(report.error).tensor == "w");
  CHECK(FieldsOf(report.error).phase == "verify");
  CHECK(fixture.outcomes == Strings{"engine e0: POISONED"});
  CHECK(fixture.ledger.highest() == 0);
}

TEST_CASE("a worker that skips a tensor in its digests is noticed") {
  SyncFixture fixture;
  fixture.script.on_step = [&](const std::string& device, const StepCommand& command) {
    Event event{.kind = Event::Kind::kStepDone,
                .device = device,
                .attempt = command.attempt,
                .step = command.step};
    event.touched = true;
    if (command.step == Step::kTransfer) event.digests = {{0, {0}, {42, 0}}};
    if (command.step == Step::kVerify) event.digests = {{0, {}, {0}}};
    fixture.mailbox.Post(std::move(event));
  };
  CHECK(FieldsOf(fixture.Sync(1).error).reason == reason::kVerifyMismatch);
}

TEST_CASE("a worker that leaves a tensor out of both of its digests is noticed") {
  SyncFixture fixture;
  fixture.script.on_step = [&](const std::string& device, const StepCommand& command) {
    Event event{.kind = Event::Kind::kStepDone, .attempt = command.attempt, .step = command.step};
    event.device = device;
    event.touched = true;
    event.digests = {{0, {}, {0}}};
    fixture.mailbox.Post(std::move(event));
  };
  CHECK(FieldsOf(fixture.Sync(1).error).reason == reason::kVerifyMismatch);
}

TEST_CASE("a layout error refuses the sync before anything is prepared") {
  SyncFixture fixture({.engines = 2});
  fixture.resolve_error =
      Error(StatusCode::kInvalidArgument, reason::kUncoveredParameter, "fix it", "no rule");
  const SyncReport report = fixture.Sync(1);
  CHECK(FieldsOf(report.error).reason == reason::kUncoveredParameter);
  CHECK(FieldsOf(report.error).phase == "resolve_layouts");
  CHECK(report.pause_us == 0);
  CHECK(fixture.outcomes.empty());
  CHECK(fixture.idle ==
        Strings{"engine e0: 1 UNCOVERED_PARAMETER", "engine e1: 1 UNCOVERED_PARAMETER"});
  CHECK(fixture.worker_log.empty());
}

TEST_CASE("an engine that dies in the transfer fails alone; the other commits") {
  SyncFixture fixture({.engines = 2});
  fixture.script.on_step = [&](const std::string& device, const StepCommand& command) {
    if (command.step == Step::kTransfer && command.attempt.counter == 1) {
      fixture.Lose(fixture.engine_members[0], true);
    }
    fixture.StepDone(device, command, 42);
  };
  const SyncReport report = fixture.Sync(1);
  CHECK(FieldsOf(report.error).reason == reason::kPeerLost);
  REQUIRE(report.replicas.size() == 2);
  CHECK_FALSE(report.replicas[0].committed);
  CHECK(report.replicas[1].committed);
  CHECK(fixture.replicas[1]->state == ReplicaState::kServing);
  CHECK(fixture.Sync(2, 1).error.ok());
}

TEST_CASE(
    "an actor that dies in the transfer fails the sync for all and poisons what was touched") {
  SyncFixture fixture;
  fixture.script.on_step = [&](const std::string& device, const StepCommand& command) {
    fixture.Lose(fixture.group.ranks[1]->member, false);
    fixture.StepDone(device, command, 42);
  };
  const SyncReport report = fixture.Sync(1);
  CHECK(FieldsOf(report.error).peer == "actor");
  CHECK(FieldsOf(report.error).phase == "transfer");
  CHECK(fixture.outcomes == Strings{"engine e0: POISONED"});
  CHECK(fixture.actors[0]->report->error.code() == StatusCode::kUnavailable);
}

TEST_CASE("an engine that does not answer Prepare is named at the deadline and left untouched") {
  SyncFixture fixture;
  fixture.script.on_prepare = [](MemberId, AttemptId) {};
  const SyncReport report = fixture.Sync(1);
  CHECK(report.error.code() == StatusCode::kDeadlineExceeded);
  CHECK(FieldsOf(report.error).peer == "engine e0");
  CHECK(FieldsOf(report.error).phase == "prepare");
  CHECK(fixture.outcomes == Strings{"engine e0: untouched"});
  CHECK(fixture.replicas[0]->state == ReplicaState::kRegistered);
}

TEST_CASE("an engine that does not publish is not acknowledged, and is poisoned") {
  SyncFixture fixture;
  fixture.script.on_commit = [](MemberId, AttemptId) {};
  const SyncReport report = fixture.Sync(1);
  CHECK(report.error.code() == StatusCode::kDeadlineExceeded);
  CHECK(FieldsOf(report.error).peer == "engine e0");
  CHECK(FieldsOf(report.error).phase == "commit");
  CHECK(fixture.outcomes == Strings{"engine e0: POISONED"});
  CHECK(fixture.ledger.highest() == 0);
}

TEST_CASE("a worker that never answers is killed before the report: that is the fence") {
  SyncFixture fixture;
  fixture.script.on_step = [](const std::string&, const StepCommand&) {};
  const SyncReport report = fixture.Sync(1);
  CHECK(report.error.code() == StatusCode::kDeadlineExceeded);
  CHECK(fixture.workers_killed == std::set<std::string>{"host"});
  CHECK(fixture.outcomes == Strings{"engine e0: POISONED"});
}

TEST_CASE("a failed sync consumes no version; the same one heals the engine") {
  SyncFixture fixture;
  fixture.script.on_step = [&](const std::string& device, const StepCommand& command) {
    fixture.StepDone(device, command, 42,
                     Error(StatusCode::kUnavailable, reason::kPeerLost, "", "gone"));
  };
  REQUIRE_FALSE(fixture.Sync(1).error.ok());
  CHECK(fixture.replicas[0]->state == ReplicaState::kPoisoned);
  fixture.script.on_step = nullptr;
  CHECK(fixture.Sync(1).error.ok());
  CHECK(fixture.replicas[0]->state == ReplicaState::kServing);
}

TEST_CASE("a rank that never arrives is named at the deadline of admit") {
  SyncFixture fixture;
  SyncSession session(fixture, fixture.mailbox, 1);
  SyncRequest request;
  request.version = 1;
  request.rank = 0;
  request.port = fixture.actors[0];
  REQUIRE(session.AddRequest(std::move(request)));
  const SyncReport report = session.Run();
  CHECK(report.error.code() == StatusCode::kDeadlineExceeded);
  CHECK(FieldsOf(report.error).peer == "actor 1");
  CHECK(fixture.outcomes.empty());
  CHECK(fixture.idle == Strings{"engine e0: 1 DEADLINE"});
}

TEST_CASE("an engine that holds the version already is told that no attempt is coming") {
  SyncFixture fixture({.engines = 2});
  fixture.script.on_step = [&](const std::string& device, const StepCommand& command) {
    const bool fails = command.attempt.counter == 2;
    fixture.StepDone(
        device, command, 42,
        fails ? Error(StatusCode::kUnavailable, reason::kPeerLost, "", "gone") : Status());
  };
  REQUIRE_FALSE(fixture.Sync(1).error.ok());
  CHECK(fixture.idle.empty());
  fixture.script.on_step = nullptr;
  REQUIRE(fixture.Sync(1).error.ok());
  CHECK(fixture.idle == Strings{"engine e0: 1 ok"});
}

TEST_CASE("derived parameters are acknowledged as loadable") {
  SyncFixture fixture;
  CHECK(std::string(fixture.ViewReplicas()[0].verified()) == "memory");
  ReplicaView view = fixture.ViewReplicas()[0];
  auto rank = std::make_shared<EngineRank>(*view.targets[0].rank);
  rank->params = {{"a", {1}, DType::kFloat32}, {"b", {1}, DType::kFloat32, ParamKind::kDerived}};
  view.targets[0].rank = rank;
  CHECK(std::string(view.verified()) == "loadable");
}

}  // namespace
}  // namespace weightd
