// The host path: shards and parameters lie in shared memory of this host, a cast-copy loop moves
// them.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "daemon/base/status.h"
#include "daemon/device/host/cast.h"
#include "daemon/device/host/thread_pool.h"
#include "daemon/transport/transport.h"

namespace weightd {

struct ShmOptions {
  /// Threads that copy, the caller being one; 0: the cores that this process may use, at most 8.
  int num_threads = 0;
  /// Row kernels; nullptr: the fastest of this CPU.
  const host::RowKernels* kernels = nullptr;
  /// False: Transfer computes no digest and returns zero words. Only to measure what it costs.
  bool digest = true;
};

/// Transport between mapped host memory. Copies the windows of a plan in order, the copies of one
/// window in parallel. Staged shards are fetched part by part, never more than
/// StagedSource::max_part_bytes at a time; the transport itself holds no bytes.
/// Thread safety: one call at a time, from any thread.
class ShmTransport final : public Transport {
 public:
  explicit ShmTransport(const ShmOptions& options = {});
  ~ShmTransport() override;

  std::string_view name() const override { return "shm"; }
  StatusOr<RankDigests> Transfer(const BoundPlan& plan, size_t target,
                                 RunControl& control) override;
  /// Follows the layout's writes, not the plan's copies: a copy that the plan lacks shows as a
  /// difference.
  StatusOr<RankDigests> Verify(const BoundPlan& plan, size_t target, RunControl& control) override;
  StatusOr<uint64_t> DigestShard(const BoundPlan& plan, uint32_t rank, uint32_t tensor,
                                 uint32_t shard, RunControl& control) override;

 private:
  class Step;

  const host::RowKernels& kernels_;
  const bool digest_;
  host::ThreadPool pool_;
};

}  // namespace weightd
