// The wire between GPUs: one nonblocking NCCL communicator for each lane.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "daemon/device/cuda/event.h"
#include "daemon/device/cuda/handles.h"
#include "daemon/device/cuda/stream.h"
#include "daemon/transport/nccl/nccl_library.h"
#include "daemon/transport/wire/wire.h"

namespace weightd {

/// CTAs, and so channels, of a lane's communicator. Turns of 64 MiB between two H200 over NVLink:
/// one lane of 16 reaches 240 GB/s, one of 32 328, two of 16 365 (the link 370). NCCL takes 6 MiB
/// of device memory for each, and 2 MiB more for each peer. The environment's NCCL_MAX_CTAS wins.
inline constexpr int kLaneCtas = 16;
/// Multiprocessors that NCCL's kernels occupy. A group waits for those of its peers on the same
/// lane, so a device must have room for all lanes at once: else one device could run only a lane's
/// and its peer only another's, for ever.
inline constexpr int kMaxNcclCtas = static_cast<int>(kWireLanes) * kLaneCtas;

/// What the ranks of a wire must have alike in NCCL's environment, before it is loaded. Buffers of
/// 1 MiB, an eighth of it a chunk, are as fast between NVLink peers as the 4 MiB that NCCL has by
/// itself, and those of LL128, which messages never use, are as small as can be: 2 MiB for each
/// channel of a receiver instead of 10.
void SetNcclEnvironment();

/// Every call of NCCL may end before its work has; the state of a communicator is looked at before
/// the next, and before anything is put on its stream behind it.
class NcclWire final : public Wire {
 public:
  /// The identities of the lanes' communicators.
  using Ids = std::array<ncclUniqueId, kWireLanes>;

  /// Begins to join. \error UNAVAILABLE WIRE or DEVICE
  static StatusOr<std::unique_ptr<NcclWire>> Create(const NcclLibrary* nccl, cuda::DeviceId device,
                                                    const Ids& ids, uint32_t rank, uint32_t size);
  ~NcclWire() override;

  /// Joins the lanes one after the other.
  StatusOr<bool> Opened() override;
  StatusOr<bool> Ready(uint32_t lane) override { return Settled(&lanes_[lane]); }
  Status Start(uint32_t lane, std::span<const WireMessage> group) override;
  StatusOr<uint64_t> Ended() override;
  void Abort() override;
  void AwaitNews(microseconds limit) override;

 private:
  /// Groups whose ends are not known yet, at most.
  static constexpr uint64_t kMaxGroups = kWireSlots;

  struct Lane {
    ncclUniqueId id{};
    cuda::Stream stream;
    ncclComm_t comm = nullptr;
    std::optional<uint64_t> unmarked;  ///< group whose end is not marked on the stream yet
  };

  NcclWire(const NcclLibrary* nccl, cuda::DeviceId device, uint32_t rank, uint32_t size)
      : nccl_(nccl), device_(device), rank_(rank), size_(size) {}
  Status Join(Lane* lane);
  StatusOr<bool> Settled(Lane* lane);

  const NcclLibrary* const nccl_;
  const cuda::DeviceId device_;
  const uint32_t rank_;
  const uint32_t size_;
  std::array<Lane, kWireLanes> lanes_;
  std::array<cuda::Event, kMaxGroups> ends_;  ///< by group
  std::array<bool, kMaxGroups> marked_{};     ///< by group: its end is on the stream
  uint64_t started_ = 0;                      ///< groups
  uint64_t ended_ = 0;                        ///< groups
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
