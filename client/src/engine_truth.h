// What is true about one engine rank's memory: a state machine without I/O.
#pragma once

#include <cstdint>
#include <string>

#include "daemon/base/status.h"
#include "weightd/v1/engine.pb.h"
#include "weightd/v1/types.pb.h"

namespace weightd {

/// What the daemon waits for.
enum class Pending { kNothing, kPrepare, kConvert, kCommit };

/// (version, attempt, dirty) of one engine rank. dirty is set before its memory may be written, or
/// when its replica is poisoned, and cleared only by a commit or by the daemon's word that no byte
/// was written.
/// Thread safety: none; the owner serialises.
class EngineTruth {
 public:
  uint64_t version() const { return version_; }
  const v1::AttemptId& attempt() const { return attempt_; }
  bool dirty() const { return dirty_; }
  v1::EngineState state() const { return state_; }
  Pending pending() const { return pending_; }
  /// The stage to convert; 0 unless that is pending.
  uint32_t stage() const { return pending_ == Pending::kConvert ? stage_ : 0; }
  /// The version that the running attempt brings; 0 outside of one.
  uint64_t offered() const { return running_ ? offered_version_ : 0; }
  /// Why the last attempt failed; OK if it did not.
  const Status& error() const { return error_; }

  /// An attempt is about to write. Sets dirty; Prepare is pending.
  /// \error ABORTED FENCED if an attempt as new or newer has been seen: a daemon or session that
  /// was thought dead woke up
  Status Prepare(const v1::EnginePrepare& prepare);
  /// The caller answered Prepare. \error FAILED_PRECONDITION if none is pending
  Status Quiesced();

  /// A stage is verified; its conversion is pending.
  /// \error ABORTED FENCED if it is not the attempt that was prepared
  Status Convert(const v1::EngineConvert& convert);
  /// The caller answered it. \error FAILED_PRECONDITION if none is pending
  Status Converted();

  /// The attempt is verified; Commit is pending.
  /// \error ABORTED FENCED if it is not the attempt that was prepared
  Status Commit(const v1::EngineCommit& commit);
  /// The caller answered Commit; with `taken` this rank now holds the new version.
  /// \error FAILED_PRECONDITION if none is pending
  Status Committed(bool taken);

  /// The end of an attempt. Outcomes of other attempts are ignored.
  void Outcome(const v1::EngineOutcome& outcome);

  /// The daemon is gone. An attempt that was not answered yet has not written anything.
  void DaemonLost(const Status& cause);

 private:
  v1::EngineState resting_state() const;
  void Untouched();

  uint64_t version_ = 0;
  v1::AttemptId attempt_;  // the last that may have touched the memory
  bool dirty_ = false;
  v1::EngineState state_ = v1::ENGINE_STATE_REGISTERED;
  Pending pending_ = Pending::kNothing;
  uint32_t stage_ = 0;  // while its conversion is pending
  Status error_;

  bool running_ = false;            // between Prepare and Outcome
  v1::AttemptId seen_;              // the newest attempt that was prepared
  uint64_t offered_version_ = 0;    // of the running attempt
  bool was_dirty_ = false;          // before the running attempt
  v1::AttemptId previous_attempt_;  // attempt_ before the running attempt
};

/// "", "prepare", "convert" or "commit".
std::string PendingName(Pending pending);

}  // namespace weightd
