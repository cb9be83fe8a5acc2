// The path between mapped GPU memories: the worker of the source's GPU stores, casting, straight
// into the engine's parameters on its own or a peer GPU. Nothing is staged.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <string_view>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/device/cuda/box_kernels.h"
#include "daemon/device/cuda/event.h"
#include "daemon/device/cuda/handles.h"
#include "daemon/device/cuda/stream.h"
#include "daemon/transport/ipc/step_table.h"
#include "daemon/transport/transport.h"

namespace weightd {

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
  /// A table in device memory with its words and windows.
  struct Loaded {
    std::vector<uint64_t> key;  ///< plan, target and registrations; empty: not kept
    cuda::BoxTable table;
    cuda::DigestWords words;
    std::vector<StepWindow> windows;
    std::vector<std::byte*> bases;  ///< of the ranges, for the copy engine
  };
  using BuildFn = std::function<StatusOr<StepTable>(const StepBinder& binder)>;

  IpcTransport(cuda::DeviceId device, const IpcOptions& options)
      : device_(device), options_(options) {}
  StatusOr<RankDigests> RunTarget(const BoundPlan& plan, size_t target, RunControl& control,
                                  std::string_view phase, uint64_t kind, const BuildFn& build);
  StatusOr<Loaded> Load(StepTable step);
  StatusOr<Loaded*> Find(std::vector<uint64_t> key, const StepBinder& binder, const BuildFn& build);
  void MakeRoom();
  StatusOr<std::vector<uint64_t>> Run(Loaded* loaded, const std::function<Status()>& launch);
  Status RunGroups(Loaded* loaded, const StepBinder& binder, bool remote);
  Status LaunchGroup(Loaded* loaded, uint32_t first, uint32_t end, bool remote);
  Status Await(const cuda::Event& event);
  Status Note(Status status);

  const cuda::DeviceId device_;
  const IpcOptions options_;
  cuda::Stream stream_;
  cuda::Stream copy_stream_;  ///< of the copy engine; joined to stream_ after every group
  cuda::Event copied_;
  cuda::Event events_[2];
  int local_blocks_ = 0;
  bool broken_ = false;
  std::list<Loaded> tables_;  ///< latest use first
};

}  // namespace weightd
