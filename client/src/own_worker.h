// When this client starts a worker, and when it gives up.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "client/src/worker_spawner.h"
#include "daemon/base/clock.h"

namespace weightd {

/// Serves the daemon's orders. Thread safety: the session's thread only.
class OwnWorker {
 public:
  /// Starts in a row that may end before the daemon has taken the worker.
  static constexpr int kStarts = 3;

  /// What the daemon has to know of an end of the worker.
  struct Report {
    v1::WorkerEnded message;
    Status error;  ///< for this client
  };

  /// Without settings this client starts no worker. `on_end` is called by another thread and leads
  /// to Ended on the session's.
  OwnWorker(const std::optional<SpawnSettings>& settings, const std::string& daemon,
            WorkerSpawner::EndFn on_end);

  void Start(const v1::StartWorker& order);
  void Stop(const v1::StopWorker& order);
  /// The session is over: so are its orders. Blocks until the worker is gone.
  void Quit();
  /// The daemon says where the worker of a device is: it has attached.
  void Seen(const v1::WorkerEndpoint& endpoint);

  /// The worker of this order has ended. With `awaited` somebody waits for its first start: the
  /// client gives up after kStarts; otherwise it goes on. nullopt: it was an earlier order's.
  std::optional<Report> Ended(uint64_t order, const std::string& how, bool awaited);
  /// The worker should have attached by deadline(). \pre that has passed
  std::optional<Report> Late(bool awaited);
  /// Clock::time_point::max() while nothing is due.
  Clock::time_point deadline() const { return deadline_; }

 private:
  Report GiveUp(const std::string& how);

  const std::string binary_;
  std::unique_ptr<WorkerSpawner> spawner_;  // nullptr: starts none
  uint64_t order_ = 0;                      // number of the present or last one
  std::string device_;                      // of the present order; empty: there is none
  int failures_ = 0;                        // ends in a row without having attached
  bool attached_ = false;
  Clock::time_point deadline_ = Clock::time_point::max();
};

}  // namespace weightd
