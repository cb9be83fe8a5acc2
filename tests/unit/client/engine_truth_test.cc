#include "client/src/engine_truth.h"

#include <catch2/catch.hpp>

namespace weightd {
namespace {

template <typename Message>
Message Of(uint64_t epoch, uint64_t counter, uint64_t version) {
  Message message;
  message.mutable_attempt()->set_epoch(epoch);
  message.mutable_attempt()->set_counter(counter);
  message.set_version(version);
  return message;
}

v1::EngineOutcome OutcomeOf(uint64_t counter, v1::EngineState state, bool untouched) {
  auto outcome = Of<v1::EngineOutcome>(1, counter, 0);
  outcome.set_state(state);
  outcome.set_untouched(untouched);
  return outcome;
}

/// An engine that committed version 3 in attempt 1.1.
EngineTruth Serving() {
  EngineTruth truth;
  CHECK(truth.Prepare(Of<v1::EnginePrepare>(1, 1, 3)).ok());
  CHECK(truth.Quiesced().ok());
  CHECK(truth.Commit(Of<v1::EngineCommit>(1, 1, 3)).ok());
  CHECK(truth.Committed(true).ok());
  truth.Outcome(OutcomeOf(1, v1::ENGINE_STATE_SERVING, false));
  return truth;
}

}  // namespace

TEST_CASE("a commit makes the engine clean at the new version") {
  const EngineTruth truth = Serving();
  CHECK(truth.version() == 3);
  CHECK_FALSE(truth.dirty());
  CHECK(truth.attempt().counter() == 1);
  CHECK(truth.state() == v1::ENGINE_STATE_SERVING);
  CHECK(truth.pending() == Pending::kNothing);
}

TEST_CASE("the engine is dirty before Prepare is answered") {
  EngineTruth truth = Serving();
  REQUIRE(truth.Prepare(Of<v1::EnginePrepare>(1, 2, 4)).ok());
  CHECK(truth.dirty());
  CHECK(truth.pending() == Pending::kPrepare);
  CHECK(truth.state() == v1::ENGINE_STATE_STAGING);
  CHECK(truth.version() == 3);
}

TEST_CASE("a stage is converted within the attempt that brought it") {
  EngineTruth truth = Serving();
  v1::EngineConvert convert;
  convert.mutable_attempt()->set_epoch(1);
  convert.mutable_attempt()->set_counter(2);
  convert.set_stage(1);
  CHECK_FALSE(truth.Convert(convert).ok());
  REQUIRE(truth.Prepare(Of<v1::EnginePrepare>(1, 2, 4)).ok());
  CHECK_FALSE(truth.Convert(convert).ok());  // not quiet yet
  REQUIRE(truth.Quiesced().ok());
  REQUIRE(truth.Convert(convert).ok());
  CHECK(truth.pending() == Pending::kConvert);
  CHECK(truth.stage() == 1);
  CHECK(truth.offered() == 4);
  CHECK_FALSE(truth.Commit(Of<v1::EngineCommit>(1, 2, 4)).ok());  // not answered yet
  REQUIRE(truth.Converted().ok());
  CHECK(truth.stage() == 0);
  CHECK_FALSE(truth.Converted().ok());
  CHECK(truth.dirty());
  CHECK(truth.Commit(Of<v1::EngineCommit>(1, 2, 4)).ok());
}

TEST_CASE("an untouched engine is what it was before the attempt") {
  EngineTruth truth = Serving();
  REQUIRE(truth.Prepare(Of<v1::EnginePrepare>(1, 2, 4)).ok());
  REQUIRE(truth.Quiesced().ok());
  truth.Outcome(OutcomeOf(2, v1::ENGINE_STATE_SERVING, true));
  CHECK_FALSE(truth.dirty());
  CHECK(truth.version() == 3);
  CHECK(truth.attempt().counter() == 1);
}

TEST_CASE("a poisoned engine stays dirty when a later attempt leaves it untouched") {
  EngineTruth truth = Serving();
  REQUIRE(truth.Prepare(Of<v1::EnginePrepare>(1, 2, 4)).ok());
  REQUIRE(truth.Quiesced().ok());
  truth.Outcome(OutcomeOf(2, v1::ENGINE_STATE_POISONED, false));
  CHECK(truth.dirty());
  REQUIRE(truth.Prepare(Of<v1::EnginePrepare>(1, 3, 5)).ok());
  truth.Outcome(OutcomeOf(3, v1::ENGINE_STATE_POISONED, true));
  CHECK(truth.dirty());
  CHECK(truth.state() == v1::ENGINE_STATE_POISONED);
}

TEST_CASE("an attempt that is not newer than one seen is fenced and changes nothing") {
  EngineTruth truth = Serving();
  REQUIRE(truth.Prepare(Of<v1::EnginePrepare>(2, 5, 4)).ok());
  truth.Outcome(Of<v1::EngineOutcome>(2, 5, 0));
  for (const auto& stale : {Of<v1::EnginePrepare>(1, 9, 9), Of<v1::EnginePrepare>(2, 4, 9),
                            Of<v1::EnginePrepare>(2, 5, 9)}) {
    const Status fenced = truth.Prepare(stale);
    CHECK(fenced.code() == StatusCode::kAborted);
    CHECK(FieldsOf(fenced).reason == reason::kFenced);
  }
  CHECK(truth.pending() == Pending::kNothing);
  CHECK(truth.Commit(Of<v1::EngineCommit>(2, 5, 9)).code() == StatusCode::kAborted);
}

TEST_CASE("a daemon that dies before Prepare is answered leaves the engine clean") {
  EngineTruth truth = Serving();
  REQUIRE(truth.Prepare(Of<v1::EnginePrepare>(1, 2, 4)).ok());
  truth.DaemonLost(Status(StatusCode::kUnavailable, "gone"));
  CHECK_FALSE(truth.dirty());
  CHECK(truth.state() == v1::ENGINE_STATE_SERVING);
  CHECK_FALSE(truth.Quiesced().ok());
}

TEST_CASE("a daemon that dies after Prepare was answered leaves the engine poisoned") {
  EngineTruth truth = Serving();
  REQUIRE(truth.Prepare(Of<v1::EnginePrepare>(1, 2, 4)).ok());
  REQUIRE(truth.Quiesced().ok());
  truth.DaemonLost(Status(StatusCode::kUnavailable, "gone"));
  CHECK(truth.dirty());
  CHECK(truth.state() == v1::ENGINE_STATE_POISONED);
  CHECK_FALSE(truth.error().ok());
}

TEST_CASE("a commit that the engine cannot take leaves it dirty at its old version") {
  EngineTruth truth = Serving();
  REQUIRE(truth.Prepare(Of<v1::EnginePrepare>(1, 2, 4)).ok());
  REQUIRE(truth.Quiesced().ok());
  REQUIRE(truth.Commit(Of<v1::EngineCommit>(1, 2, 4)).ok());
  REQUIRE(truth.Committed(false).ok());
  CHECK(truth.dirty());
  CHECK(truth.version() == 3);
}

TEST_CASE("a rank that committed is dirty again when its replica is poisoned") {
  EngineTruth truth = Serving();
  REQUIRE(truth.Prepare(Of<v1::EnginePrepare>(1, 2, 4)).ok());
  REQUIRE(truth.Quiesced().ok());
  REQUIRE(truth.Commit(Of<v1::EngineCommit>(1, 2, 4)).ok());
  REQUIRE(truth.Committed(true).ok());
  CHECK_FALSE(truth.dirty());
  truth.Outcome(OutcomeOf(2, v1::ENGINE_STATE_POISONED, false));
  CHECK(truth.dirty());
  truth.DaemonLost(Status(StatusCode::kUnavailable, "gone"));
  CHECK(truth.state() == v1::ENGINE_STATE_POISONED);
}

TEST_CASE("a commit before the engine is quiescent is refused") {
  EngineTruth truth = Serving();
  REQUIRE(truth.Prepare(Of<v1::EnginePrepare>(1, 2, 4)).ok());
  CHECK_FALSE(truth.Commit(Of<v1::EngineCommit>(1, 2, 4)).ok());
  CHECK(truth.pending() == Pending::kPrepare);
}

}  // namespace weightd
