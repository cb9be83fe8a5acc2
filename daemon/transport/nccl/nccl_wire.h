// The wire between GPUs: one nonblocking NCCL communicator.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "daemon/device/cuda/event.h"
#include "daemon/device/cuda/handles.h"
#include "daemon/device/cuda/stream.h"
#include "daemon/transport/nccl/nccl_library.h"
#include "daemon/transport/wire/wire.h"

namespace weightd {

/// CTAs, and so channels, of a communicator. Messages of 64 MiB between two H200 over NVLink: 16 of
/// them reach 240 GB/s, 32 reach 322 for 128 MiB more at the sender and 256 MiB at the receiver.
/// The environment's NCCL_MAX_CTAS wins.
inline constexpr int kMaxNcclCtas = 32;

/// Every call of NCCL may end before its work has; the state of the communicator is looked at
/// before the next, and before anything is put on the stream behind it.
class NcclWire final : public Wire {
 public:
  /// Begins to join. \error UNAVAILABLE WIRE or DEVICE
  static StatusOr<std::unique_ptr<NcclWire>> Create(const NcclLibrary* nccl, cuda::DeviceId device,
                                                    const ncclUniqueId& id, uint32_t rank,
                                                    uint32_t size);
  ~NcclWire() override;

  StatusOr<bool> Opened() override { return Settled(); }
  StatusOr<bool> Ready() override { return Settled(); }
  Status Start(std::span<const WireMessage> group) override;
  StatusOr<uint64_t> Ended() override;
  void Abort() override;
  void AwaitNews(microseconds limit) override;

 private:
  /// Groups whose ends are not known yet, at most.
  static constexpr uint64_t kMaxGroups = kWireSlots + 1;

  NcclWire(const NcclLibrary* nccl, cuda::DeviceId device) : nccl_(nccl), device_(device) {}
  StatusOr<bool> Settled();

  const NcclLibrary* const nccl_;
  const cuda::DeviceId device_;
  cuda::Stream stream_;
  std::array<cuda::Event, kMaxGroups> ends_;
  ncclComm_t comm_ = nullptr;
  uint64_t started_ = 0;   ///< groups
  uint64_t recorded_ = 0;  ///< groups whose end is marked on the stream
  uint64_t ended_ = 0;     ///< groups
};

class NcclWireMaker final : public WireMaker {
 public:
  NcclWireMaker(const NcclLibrary* nccl, cuda::DeviceId device) : nccl_(nccl), device_(device) {}

  std::string_view name() const override { return "nccl"; }
  StatusOr<std::string> MakeId() override;
  StatusOr<std::unique_ptr<Wire>> Open(const std::string& id, uint32_t rank,
                                       uint32_t size) override;

 private:
  const NcclLibrary* const nccl_;
  const cuda::DeviceId device_;
};

}  // namespace weightd
