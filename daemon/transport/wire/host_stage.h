#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "daemon/device/host/cast.h"
#include "daemon/transport/wire/wire.h"
#include "daemon/transport/wire/wire_binder.h"

namespace weightd {

/// Staging in host memory; every call does its work before it returns.
class HostStage final : public WireStage {
 public:
  HostStage() : kernels_(host::BestKernels()) {}

  Status Reserve(uint64_t bytes) override;
  std::byte* ring() override { return ring_.data(); }
  uint64_t ring_bytes() const override { return ring_.size(); }
  Status Begin(const BoundPlan& plan, const WireSchedule& schedule, RunControl& control) override;
  Status Pack(uint32_t turn) override;
  StatusOr<uint32_t> Packed() override { return packed_; }
  Status Scatter(uint32_t turn) override;
  StatusOr<uint32_t> Scattered() override { return scattered_; }
  StatusOr<std::vector<uint64_t>> Words() override { return words_; }
  Status Drain() override { return absl::OkStatus(); }

 private:
  const host::RowKernels& kernels_;
  std::vector<std::byte> ring_;
  const WireSchedule* schedule_ = nullptr;
  std::optional<WireBinder> binder_;
  std::vector<uint64_t> words_;
  uint32_t packed_ = 0;
  uint32_t scattered_ = 0;
};

}  // namespace weightd
