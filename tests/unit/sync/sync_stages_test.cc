// A sync of engines that receive derived parameters in several stages.
#include <algorithm>
#include <catch2/catch.hpp>

#include "tests/unit/sync/sync_fixture.h"

namespace weightd {
namespace {

using Strings = std::vector<std::string>;

/// Answers with the given words of the tensors that a round reads, of which the plan has one.
void Answer(SyncFixture& fixture, const StepCommand& command, const std::vector<uint32_t>& tensors,
            uint64_t word) {
  Event event{.kind = Event::Kind::kStepDone,
              .device = "host",
              .attempt = command.attempt,
              .step = command.step};
  event.touched = true;
  event.bytes = 8;
  std::vector<uint64_t> words(tensors.size() + 1, word);
  words.back() = 0;
  event.digests = {{.target = 0, .tensors = tensors, .words = words}};
  fixture.mailbox.Post(std::move(event));
}

Status Gone() { return Error(StatusCode::kUnavailable, reason::kPeerLost, "", "gone"); }

}  // namespace

TEST_CASE("each stage is transferred, verified and converted before the next") {
  SyncFixture fixture({.stages = {3}});
  const SyncReport report = fixture.Sync(1);
  REQUIRE(report.error.ok());
  CHECK(fixture.worker_log == Strings{"plan", "transfer", "verify", "engine e0 converts 1",
                                      "transfer+1", "verify+1", "engine e0 converts 2",
                                      "transfer+2", "verify+2"});
  CHECK(fixture.outcomes == Strings{"engine e0: committed"});
  CHECK(report.bytes == 16);
  Strings phases;
  for (const auto& [phase, micros] : report.phases) phases.emplace_back(Name(phase));
  CHECK(phases == Strings{"admit", "resolve_layouts", "build_plan", "prepare", "transfer", "verify",
                          "commit", "report"});
  fixture.worker_log.clear();
  REQUIRE(fixture.Sync(2).error.ok());
  CHECK(fixture.worker_log.size() == 8);
}

TEST_CASE("one stage takes one round") {
  SyncFixture fixture({.stages = {1}});
  REQUIRE(fixture.Sync(1).error.ok());
  CHECK(fixture.worker_log == Strings{"plan", "transfer", "verify"});
}

TEST_CASE("an engine with fewer stages is not asked again, and commits with the others") {
  SyncFixture fixture({.engines = 3, .stages = {2, 0, 3}});
  fixture.script.on_commit = [&](MemberId member, AttemptId attempt) {
    fixture.worker_log.emplace_back("commit");
    fixture.mailbox.Post({.kind = Event::Kind::kCommitted, .member = member, .attempt = attempt});
  };
  REQUIRE(fixture.Sync(1).error.ok());
  const auto count = [&](const char* what) {
    return std::count(fixture.worker_log.begin(), fixture.worker_log.end(), what);
  };
  CHECK(count("transfer") == 3);
  CHECK(count("transfer+1") == 2);
  CHECK(count("verify+2") == 1);
  CHECK(count("engine e0 converts 1") == 1);
  CHECK(count("engine e0 converts 2") == 0);  // its last: with Commit
  CHECK(count("engine e1 converts 1") == 0);
  CHECK(count("engine e2 converts 2") == 1);
  CHECK(Strings(fixture.worker_log.end() - 3, fixture.worker_log.end()) ==
        Strings{"commit", "commit", "commit"});
}

TEST_CASE("bytes that differ in a round are found before anybody converts them") {
  const uint32_t bad = GENERATE(0u, 1u, 2u);
  SyncFixture fixture({.stages = {3}});
  fixture.script.on_step = [&](const std::string&, const StepCommand& command) {
    const bool wrong = command.step == Step::kVerify && command.round == bad;
    Answer(fixture, command, {0}, wrong ? 43 : 42);
  };
  const SyncReport report = fixture.Sync(1);
  CHECK(FieldsOf(report.error).reason == reason::kVerifyMismatch);
  CHECK(FieldsOf(report.error).phase == "verify");
  CHECK(fixture.outcomes == Strings{"engine e0: POISONED"});
  const auto conversions =
      std::count_if(fixture.worker_log.begin(), fixture.worker_log.end(),
                    [](const std::string& line) { return line.starts_with("engine"); });
  CHECK(conversions == bad);
  CHECK(fixture.ledger.highest() == 0);
}

TEST_CASE("a tensor may come in any round, but it has to come") {
  const bool comes = GENERATE(true, false);
  SyncFixture fixture({.stages = {2}});
  fixture.script.on_step = [&](const std::string&, const StepCommand& command) {
    std::vector<uint32_t> tensors(command.round == 1 && comes ? 1 : 0);
    Answer(fixture, command, tensors, 42);
  };
  const SyncReport report = fixture.Sync(1);
  CHECK(report.error.ok() == comes);
  if (!comes) CHECK(FieldsOf(report.error).reason == reason::kVerifyMismatch);
}

TEST_CASE("the same version with other bytes in an early round is noticed") {
  SyncFixture fixture({.engines = 2, .stages = {2}});
  uint64_t word = 42;
  fixture.script.on_step = [&](const std::string&, const StepCommand& command) {
    Answer(fixture, command, {0}, command.round == 0 ? word : 7);
  };
  fixture.script.on_commit = [&](MemberId member, AttemptId attempt) {
    const bool lost = member == fixture.engine_members[1] && word == 42;
    if (lost) return fixture.Lose(member, true);
    fixture.mailbox.Post({.kind = Event::Kind::kCommitted, .member = member, .attempt = attempt});
  };
  REQUIRE_FALSE(fixture.Sync(1).error.ok());
  CHECK(fixture.ledger.highest() == 1);
  word = 41;
  CHECK(FieldsOf(fixture.Sync(1).error).reason == reason::kReusedVersion);
}

TEST_CASE("a failure in a later round poisons, whatever its worker says of that round") {
  SyncFixture fixture({.stages = {3}});
  fixture.script.on_step = [&](const std::string& device, const StepCommand& command) {
    if (command.step != Step::kTransfer || command.round != 1)
      return fixture.StepDone(device, command);
    fixture.mailbox.Post({.kind = Event::Kind::kStepDone,
                          .device = device,
                          .attempt = command.attempt,
                          .status = Gone(),
                          .step = command.step});  // without `touched`
  };
  const SyncReport report = fixture.Sync(1);
  CHECK(FieldsOf(report.error).phase == "transfer");
  CHECK(fixture.outcomes == Strings{"engine e0: POISONED"});
  fixture.script.on_step = nullptr;
  CHECK(fixture.Sync(1).error.ok());
}

TEST_CASE("an engine that cannot convert, dies or hangs between rounds fails alone") {
  const std::string how = GENERATE("refuses", "dies", "hangs", "answers for another stage");
  SyncFixture fixture({.engines = 2, .stages = {2}});
  fixture.script.on_convert = [&](MemberId member, AttemptId attempt, uint32_t stage) {
    Event event{.kind = Event::Kind::kConverted, .member = member, .attempt = attempt};
    event.stage = stage;
    if (member == fixture.engine_members[0]) {
      if (how == "dies") return fixture.Lose(member, true);
      if (how == "hangs") return;
      if (how == "refuses") event.status = Gone();
      if (how == "answers for another stage") event.stage = 2;
    }
    fixture.mailbox.Post(std::move(event));
  };
  const SyncReport report = fixture.Sync(1);
  const bool deadline = how == "hangs" || how == "answers for another stage";
  CHECK(report.error.code() ==
        (deadline ? StatusCode::kDeadlineExceeded : StatusCode::kUnavailable));
  CHECK(FieldsOf(report.error).phase == "commit");
  CHECK_FALSE(report.replicas[0].committed);
  CHECK(report.replicas[1].committed);
  CHECK(fixture.outcomes == Strings{"engine e0: POISONED", "engine e1: committed"});
  CHECK(std::count(fixture.worker_log.begin(), fixture.worker_log.end(), "transfer+1") == 1);
}

TEST_CASE("until the last round is verified the trainer may cancel, and its death ends the sync") {
  const bool cancelled = GENERATE(true, false);
  SyncFixture fixture({.stages = {2}});
  fixture.script.on_convert = [&](MemberId, AttemptId, uint32_t) {
    if (!cancelled) return fixture.Lose(fixture.group.ranks[1]->member, false);
    fixture.mailbox.Post({.kind = Event::Kind::kCancelled});
  };
  const SyncReport report = fixture.Sync(1);
  CHECK(FieldsOf(report.error).reason == (cancelled ? reason::kCancelled : reason::kPeerLost));
  CHECK(fixture.outcomes == Strings{"engine e0: POISONED"});
}

TEST_CASE("progress goes on over the rounds") {
  SyncFixture fixture({.stages = {2}});
  fixture.script.on_step = [&](const std::string& device, const StepCommand& command) {
    fixture.mailbox.Post(
        {.kind = Event::Kind::kProgress, .device = device, .attempt = command.attempt, .bytes = 8});
    Answer(fixture, command, {0}, 42);
  };
  REQUIRE(fixture.Sync(1).error.ok());
  const std::vector<uint64_t>& bytes = fixture.actors[0]->bytes_done;
  CHECK(*std::max_element(bytes.begin(), bytes.end()) == 16);
}

TEST_CASE("an engine with several stages says why it cannot be copied") {
  SyncFixture fixture({.engines = 2, .stages = {2, 1}});
  const std::vector<ReplicaView> views = fixture.ViewReplicas();
  CHECK(FieldsOf(views[0].CheckCopyable()).reason == reason::kStaged);
  CHECK(FieldsOf(views[0].CheckCopyable()).rank == "engine e0 dp 0");
  CHECK(views[1].CheckCopyable().ok());
}

}  // namespace weightd
