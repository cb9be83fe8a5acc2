#include "client/src/engine_truth.h"

#include <tuple>

#include "client/src/result_json.h"
#include "daemon/wire/convert.h"

namespace weightd {
namespace {

auto Order(const v1::AttemptId& attempt) {
  return std::make_tuple(attempt.epoch(), attempt.counter());
}

Status Fenced(const v1::AttemptId& got, const v1::AttemptId& seen) {
  return Error(StatusCode::kAborted, reason::kFenced,
               "stop the older daemon; only the newest attempt may write",
               "attempt is not the newest that this engine has seen: attempt={} newest={}",
               AttemptText(got), AttemptText(seen));
}

Status NothingPending(std::string_view what) {
  return Error(StatusCode::kFailedPrecondition, reason::kEngineRefused,
               "answer only while weightd_engine_state shows it as pending; the daemon or the "
               "attempt may have ended meanwhile",
               "no {} is pending", what);
}

}  // namespace

std::string PendingName(Pending pending) {
  switch (pending) {
    case Pending::kNothing:
      return "";
    case Pending::kPrepare:
      return "prepare";
    case Pending::kConvert:
      return "convert";
    case Pending::kCommit:
      return "commit";
  }
  return "";
}

v1::EngineState EngineTruth::resting_state() const {
  if (dirty_) return v1::ENGINE_STATE_POISONED;
  return version_ > 0 ? v1::ENGINE_STATE_SERVING : v1::ENGINE_STATE_REGISTERED;
}

Status EngineTruth::Prepare(const v1::EnginePrepare& prepare) {
  if (Order(prepare.attempt()) <= Order(seen_)) return Fenced(prepare.attempt(), seen_);
  was_dirty_ = dirty_;
  previous_attempt_ = attempt_;
  dirty_ = true;
  running_ = true;
  seen_ = attempt_ = prepare.attempt();
  offered_version_ = prepare.version();
  state_ = prepare.catch_up() ? v1::ENGINE_STATE_CATCHING_UP : v1::ENGINE_STATE_STAGING;
  pending_ = Pending::kPrepare;
  error_ = absl::OkStatus();
  return absl::OkStatus();
}

Status EngineTruth::Quiesced() {
  if (pending_ != Pending::kPrepare) return NothingPending("prepare");
  pending_ = Pending::kNothing;
  return absl::OkStatus();
}

Status EngineTruth::Convert(const v1::EngineConvert& convert) {
  const bool prepared = running_ && pending_ == Pending::kNothing;
  if (!prepared || Order(convert.attempt()) != Order(seen_)) {
    return Fenced(convert.attempt(), seen_);
  }
  stage_ = convert.stage();
  pending_ = Pending::kConvert;
  return absl::OkStatus();
}

Status EngineTruth::Converted() {
  if (pending_ != Pending::kConvert) return NothingPending("conversion");
  pending_ = Pending::kNothing;
  return absl::OkStatus();
}

Status EngineTruth::Commit(const v1::EngineCommit& commit) {
  const bool prepared = running_ && pending_ == Pending::kNothing;
  if (!prepared || Order(commit.attempt()) != Order(seen_)) return Fenced(commit.attempt(), seen_);
  offered_version_ = commit.version();
  state_ = v1::ENGINE_STATE_COMMITTING;
  pending_ = Pending::kCommit;
  return absl::OkStatus();
}

Status EngineTruth::Committed(bool taken) {
  if (pending_ != Pending::kCommit) return NothingPending("commit");
  pending_ = Pending::kNothing;
  if (!taken) return absl::OkStatus();
  version_ = offered_version_;
  dirty_ = false;
  return absl::OkStatus();
}

void EngineTruth::Untouched() {
  if (was_dirty_) return;
  dirty_ = false;
  attempt_ = previous_attempt_;
}

void EngineTruth::Outcome(const v1::EngineOutcome& outcome) {
  if (!running_ || Order(outcome.attempt()) != Order(seen_)) return;
  running_ = false;
  pending_ = Pending::kNothing;
  if (outcome.untouched()) Untouched();
  // This rank may have taken the version that another rank of the replica then failed to take.
  if (outcome.state() == v1::ENGINE_STATE_POISONED) dirty_ = true;
  state_ = outcome.state() == v1::ENGINE_STATE_UNSPECIFIED ? resting_state() : outcome.state();
  error_ = FromProto(outcome.error());
}

void EngineTruth::DaemonLost(const Status& cause) {
  if (running_) {
    if (pending_ == Pending::kPrepare) Untouched();
    error_ = cause;
  }
  running_ = false;
  pending_ = Pending::kNothing;
  state_ = resting_state();
}

}  // namespace weightd
