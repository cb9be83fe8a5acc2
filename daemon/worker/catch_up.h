// Fills an engine rank without a trainer: from a serving peer, or from a copy that this worker
// kept.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/base/status.h"
#include "daemon/device/host/thread_pool.h"
#include "daemon/layout/tensor_layout.h"
#include "daemon/transport/transport.h"

namespace weightd {

/// Bytes that all raw, unaliased parameters of a rank have.
uint64_t ParamBytes(const RankLayout& layout);

/// Copies whole parameters between host memories and keeps retained copies.
/// Thread safety: one call at a time.
class CatchUp {
 public:
  /// Called after each part with the bytes copied so far.
  using ProgressFn = std::function<void(uint64_t)>;
  struct Control {
    const std::atomic<bool>* cancelled = nullptr;
    Clock::time_point deadline = Clock::time_point::max();
    ProgressFn on_bytes;
  };

  /// `num_threads` copy; 0: as many as the process may use, at most 8.
  explicit CatchUp(int num_threads);
  ~CatchUp();

  /// Copies all raw and derived parameters of `layout` and compares what landed with its source.
  /// \error CANCELLED, DEADLINE_EXCEEDED DEADLINE; DATA_LOSS VERIFY_MISMATCH naming the parameter
  Status Copy(const RankLayout& layout, std::span<const Binding> from, std::span<const Binding> to,
              const Control& control);

  /// Keeps a copy of an engine rank's parameters as `version`, in place of an earlier one.
  /// \error as Copy; RESOURCE_EXHAUSTED SHARED_MEMORY if there is no memory for it
  Status Retain(const std::string& label, uint64_t version, const RankLayout& layout,
                std::span<const Binding> params, const Control& control);
  /// Fills an engine rank from its retained copy.
  /// \error as Copy; NOT_FOUND NO_PLAN if no copy of this version with these parameters is kept
  Status Restore(const std::string& label, uint64_t version, const RankLayout& layout,
                 std::span<const Binding> params, const Control& control);
  /// Frees the copies of versions below `version`.
  void DropRetained(uint64_t version);

 private:
  class HostCopy;

  Status Check(const Control& control) const;
  host::ThreadPool& pool();

  const int num_threads_;
  std::unique_ptr<host::ThreadPool> pool_;                     ///< made when it is first needed
  std::map<std::string, std::unique_ptr<HostCopy>> retained_;  ///< by label
};

}  // namespace weightd
