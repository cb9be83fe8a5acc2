// What happens while a sync runs, in the order in which it happened.
#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/base/ids.h"
#include "daemon/sync/ports.h"

namespace weightd {

/// One thing that a session waits for. Fields that do not belong to `kind` are unset.
struct Event {
  enum class Kind {
    kActorArrived,  ///< member asked for this sync
    kActorLost,     ///< member's process or memory is gone; status says why
    kEngineLost,    ///< likewise for an engine rank
    kAttached,      ///< member's memory is mapped by the worker of device
    kCancelled,     ///< an actor asked to stop; member
    kQuiesced,      ///< member, attempt, status
    kConverted,     ///< member, attempt, stage, status
    kCommitted,     ///< member, attempt, status, caches
    kPlanLoaded,    ///< device, plan, digest, status
    kProgress,      ///< device, attempt, step, bytes
    kLanded,        ///< device, attempt, round, target, writes
    kStepDone,      ///< device, attempt, step, status, bytes, digests, shard_words, touched
    kWireId,        ///< device, wire, wire_id, status
    kWireReady,     ///< device, wire, status
    kWorkerLost,    ///< device, status
    kShutdown,      ///< the daemon ends and its workers with it; status
  };
  Kind kind = Kind::kCancelled;
  MemberId member = MemberId::kNone;
  std::string device;  ///< of the worker that reports
  AttemptId attempt;
  Status status;
  uint64_t plan = 0;
  uint64_t wire = 0;
  std::string wire_id;
  Digest128 digest{};
  uint64_t bytes = 0;
  Step step = Step::kTransfer;
  std::vector<TargetDigests> digests;
  std::vector<uint64_t> shard_words;
  bool touched = false;
  std::vector<std::string> caches;
  uint32_t stage = 0;
  uint32_t round = 0;
  uint32_t target = 0;
  uint32_t writes = 0;
};

/// Thread safety: Post from any thread, Wait from one.
class Mailbox {
 public:
  void Post(Event event) {
    {
      const std::lock_guard lock(mu_);
      events_.push_back(std::move(event));
    }
    changed_.notify_one();
  }

  /// The next event, or nullopt at the deadline. Blocks.
  std::optional<Event> Wait(Clock::time_point deadline) {
    std::unique_lock lock(mu_);
    if (!changed_.wait_until(lock, deadline, [this] { return !events_.empty(); })) {
      return std::nullopt;
    }
    Event event = std::move(events_.front());
    events_.pop_front();
    return event;
  }

 private:
  std::mutex mu_;
  std::condition_variable changed_;
  std::deque<Event> events_;
};

}  // namespace weightd
