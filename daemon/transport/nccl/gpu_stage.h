// Staging in GPU memory: the box kernels pack shards into the ring and scatter it into parameters.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <vector>

#include "daemon/device/cuda/box_kernels.h"
#include "daemon/device/cuda/buffer.h"
#include "daemon/device/cuda/event.h"
#include "daemon/device/cuda/stream.h"
#include "daemon/transport/wire/wire.h"
#include "daemon/transport/wire/wire_binder.h"

namespace weightd {

/// Added device memory: the ring and two tables for each plan, which are uploaded once and replayed
/// while plan and registrations stay the same.
class GpuStage final : public WireStage {
 public:
  /// \error UNAVAILABLE DEVICE
  static StatusOr<std::unique_ptr<GpuStage>> Create(cuda::DeviceId device);

  Status Reserve(uint64_t bytes) override;
  std::byte* ring() override { return ring_.data(); }
  uint64_t ring_bytes() const override { return ring_.size_bytes(); }
  Status Begin(const BoundPlan& plan, const WireSchedule& schedule, RunControl& control) override;
  Status Pack(uint32_t turn) override { return packing_.Launch(turn, blocks_); }
  StatusOr<uint32_t> Packed() override { return packing_.Done(); }
  Status Scatter(uint32_t turn) override { return scattering_.Launch(turn, scatter_blocks_); }
  StatusOr<uint32_t> Scattered() override { return scattering_.Done(); }
  StatusOr<std::vector<uint64_t>> Words() override;
  Status Drain() override;

 private:
  /// A table whose windows are the turns.
  struct Table {
    cuda::BoxTable boxes;
    cuda::DigestWords words;
  };
  struct Tables {
    std::vector<uint64_t> key;  ///< empty: not kept
    Table pack;
    Table scatter;
    uint64_t size_bytes() const { return pack.boxes.size_bytes() + scatter.boxes.size_bytes(); }
  };
  /// The stream on which one table runs, turn by turn.
  struct Lane {
    cuda::Stream stream;
    std::array<cuda::Event, kWireSlots> ends;
    Table* table = nullptr;
    uint32_t launched = 0;
    uint32_t done = 0;

    void Begin(Table* next);
    Status Launch(uint32_t turn, int blocks);
    StatusOr<uint32_t> Done();
    StatusOr<std::vector<uint64_t>> Read();
  };
  /// Binds copy `i` of a turn.
  using BindFn = std::function<StatusOr<BlockItem>(uint32_t i, uint32_t turn)>;

  explicit GpuStage(cuda::DeviceId device) : device_(device) {}
  StatusOr<Tables> Load(const BoundPlan& plan, const WireSchedule& schedule);
  StatusOr<Table> LoadSide(const BoundPlan& plan, const WireSide& side, uint32_t num_turns,
                           size_t num_words, const BindFn& bind);

  const cuda::DeviceId device_;
  int blocks_ = 0;
  int scatter_blocks_ = 0;
  cuda::DeviceBuffer ring_;
  std::list<Tables> tables_;  ///< latest use first
  Lane packing_;
  Lane scattering_;
};

}  // namespace weightd
