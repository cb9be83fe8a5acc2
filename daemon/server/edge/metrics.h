// The daemon's metrics, in Prometheus' text format. Labels never hold tensor names, versions or
// incarnations, so that their number stays bounded.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>

namespace weightd {

/// One registry with every metric of weightd.
/// Thread safety: all functions may be called from any thread.
class Metrics {
 public:
  /// One replica of one engine.
  struct Engine {
    std::string model;
    std::string engine;
    uint32_t dp_rank = 0;
    auto operator<=>(const Engine&) const = default;
  };

  /// Both are shown by weightd_build_info: the version of weightd, and of CUDA or "none" for a
  /// build without a GPU data plane.
  Metrics(std::string_view version, std::string_view cuda);
  ~Metrics();
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

  /// A phase of a sync ended, well or not. `phase` as in logs: "admit" ... "report", or "total".
  void ObservePhase(std::string_view phase, double seconds);
  /// Bytes landed in engine memory by a transport ("shm", "ipc", "nccl", "stream").
  void AddTransferBytes(std::string_view transport, uint64_t bytes);
  /// A sync committed in every replica that it asked for. `unix_seconds`: since the epoch.
  void SetLastSuccess(std::string_view model, double unix_seconds);
  /// A sync failed. `reason` is one of daemon/base/status.h.
  void CountFailure(std::string_view reason);
  /// A replica's digests differed from the source's.
  void CountVerifyMismatch();
  /// Bytes of the staging ring of a worker in use; `device` is "host" or a GPU UUID.
  void SetStagingBytes(std::string_view device, uint64_t bytes);
  void CountWorkerRestart(std::string_view device);
  void SetWorkerUp(std::string_view device, bool up);
  /// As SetWorkerUp for all workers that clients have started; drops the series of those that were
  /// there before and are not any more.
  void SetSpawnedWorkers(const std::map<std::string, bool>& up);
  void ObservePlanCompile(double seconds);

  /// The state ("SERVING", ...) and the version that a replica holds; 0 = none.
  void SetEngine(const Engine& engine, std::string_view state, uint64_t version);
  /// Drops the series of a replica that will not come back.
  void RemoveEngine(const Engine& engine);

  /// Text exposition format 0.0.4.
  std::string Text() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace weightd
