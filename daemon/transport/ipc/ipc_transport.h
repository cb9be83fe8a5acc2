// The path between mapped GPU memories: the worker of the source's GPU stores, casting, straight
// into the engine's parameters on its own or a peer GPU. Nothing is staged.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/device/cuda/handles.h"
#include "daemon/transport/ipc/table_run.h"
#include "daemon/transport/transport.h"

namespace weightd {

/// Blocks that digest while a wire still receives: more than the link's rate needs. They, those
/// that scatter and NCCL's each have a multiprocessor for themselves.
inline constexpr int kBlocksBesideWire = 40;

struct IpcOptions {
  /// Large copies without a cast go through the copy engine: to peers it reaches the link's rate
  /// and a kernel does not; on one GPU a kernel is faster, since it digests in the same pass.
  enum class CopyEngine : uint8_t { kPeers, kAlways, kNever };
  CopyEngine copy_engine = CopyEngine::kPeers;
  /// Most device memory of tables kept for replay; a larger table is kept alone.
  uint64_t table_bytes = 24u << 20;
  /// Bytes landed between two looks at cancellation; the GPU gets two such groups ahead.
  uint64_t group_bytes = 1u << 30;
};

/// Transport between GPU memories that this process has mapped. Tables of a step are uploaded once
/// and replayed while plan and registrations stay the same. Added device memory: the tables and a
/// few kilobytes.
/// Thread safety: one call at a time, from any thread.
class IpcTransport final : public Transport {
 public:
  /// \error UNAVAILABLE DEVICE, RESOURCE_EXHAUSTED GPU_MEMORY
  static StatusOr<std::unique_ptr<IpcTransport>> Create(cuda::DeviceId device,
                                                        const IpcOptions& options = {});
  ~IpcTransport() override;

  std::string_view name() const override { return "ipc"; }
  StatusOr<RankDigests> Transfer(const BoundPlan& plan, size_t target,
                                 RunControl& control) override;
  /// Engine ranks on this GPU and on peers are written side by side: the link and the memory are
  /// different resources.
  StatusOr<std::vector<RankDigests>> TransferAll(const BoundPlan& plan,
                                                 std::span<const uint32_t> targets,
                                                 RunControl& control) override;
  StatusOr<RankDigests> Verify(const BoundPlan& plan, size_t target, RunControl& control) override;
  StatusOr<uint64_t> DigestShard(const BoundPlan& plan, uint32_t rank, uint32_t tensor,
                                 uint32_t shard, RunControl& control) override;
  Status CopyParams(const BoundPlan& plan, size_t target, std::span<const Binding> from,
                    RunControl& control) override;
  bool host_memory() const override { return false; }
  bool broken() const override { return broken_; }

  /// Device memory of the kept tables.
  uint64_t table_bytes() const;

 private:
  using BuildFn = std::function<StatusOr<StepTable>(const StepBinder& binder)>;

  IpcTransport(cuda::DeviceId device, const IpcOptions& options)
      : device_(device), options_(options) {}
  StatusOr<LoadedTable> Load(StepTable step);
  StatusOr<LoadedTable*> Find(std::vector<uint64_t> key, const StepBinder& binder,
                              const BuildFn& build);
  void MakeRoom();
  Status Run(std::span<std::vector<TableRun>> lanes, RunControl& control);
  StatusOr<std::vector<uint64_t>> RunOnce(StepTable step, const StepBinder& binder,
                                          RunControl& control);
  Status Note(Status status);

  const cuda::DeviceId device_;
  const IpcOptions options_;
  Lane local_;
  Lane remote_;                  ///< stores to peers
  int local_blocks_beside_ = 0;  ///< while the remote lane runs: more would starve it
  bool broken_ = false;
  std::list<LoadedTable> tables_;  ///< latest use first
};

}  // namespace weightd
