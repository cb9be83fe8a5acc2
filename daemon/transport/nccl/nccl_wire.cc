#include "daemon/transport/nccl/nccl_wire.h"

#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "daemon/base/log.h"
#include "daemon/device/cuda/device.h"

namespace weightd {

void SetNcclEnvironment() {
  ::setenv("NCCL_NVLS_ENABLE", "0", 1);
  ::setenv("NCCL_BUFFSIZE", "1048576", 1);
  ::setenv("NCCL_LL128_BUFFSIZE", "65536", 1);
}

StatusOr<std::unique_ptr<NcclWire>> NcclWire::Create(const NcclLibrary* nccl, cuda::DeviceId device,
                                                     const Ids& ids, uint32_t rank, uint32_t size) {
  std::unique_ptr<NcclWire> wire(new NcclWire(nccl, device, rank, size));
  for (cuda::Event& end : wire->ends_) {
    WEIGHTD_ASSIGN_OR_RETURN(end, cuda::Event::Create(device));
  }
  for (uint32_t i = 0; i < kWireLanes; ++i) {
    wire->lanes_[i].id = ids[i];
    WEIGHTD_ASSIGN_OR_RETURN(wire->lanes_[i].stream, cuda::Stream::Create(device, true));
  }
  WEIGHTD_RETURN_IF_ERROR(wire->Join(&wire->lanes_.front()));
  return wire;
}

NcclWire::~NcclWire() { Abort(); }

Status NcclWire::Join(Lane* lane) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  config.maxCTAs = kLaneCtas;
  const cuda::DeviceGuard guard(device_);
  return nccl_->ToStatus(nccl_->CommInitRankConfig(&lane->comm, static_cast<int>(size_), lane->id,
                                                   static_cast<int>(rank_), &config),
                         "ncclCommInitRankConfig", nullptr);
}

StatusOr<bool> NcclWire::Opened() {
  for (Lane& lane : lanes_) {
    if (lane.comm == nullptr) WEIGHTD_RETURN_IF_ERROR(Join(&lane));
    WEIGHTD_ASSIGN_OR_RETURN(const bool settled, Settled(&lane));
    if (!settled) return false;
  }
  return true;
}

/// True if the communicator has done what was asked of it last; then the end of its group is
/// marked.
StatusOr<bool> NcclWire::Settled(Lane* lane) {
  ncclResult_t state = ncclSuccess;
  const ncclResult_t asked = nccl_->CommGetAsyncError(lane->comm, &state);
  WEIGHTD_RETURN_IF_ERROR(nccl_->ToStatus(asked, "ncclCommGetAsyncError", lane->comm));
  WEIGHTD_RETURN_IF_ERROR(nccl_->ToStatus(state, "communicator", lane->comm));
  if (state == ncclInProgress) return false;
  if (lane->unmarked.has_value()) {
    const uint64_t group = *lane->unmarked % kMaxGroups;
    WEIGHTD_RETURN_IF_ERROR(ends_[group].Record(lane->stream.ref()));
    marked_[group] = true;
    lane->unmarked.reset();
  }
  return true;
}

Status NcclWire::Start(uint32_t number, std::span<const WireMessage> group) {
  Lane& lane = lanes_[number];
  WEIGHTD_CHECK(!lane.unmarked.has_value() && started_ - ended_ < kMaxGroups);
  const cuda::DeviceGuard guard(device_);
  WEIGHTD_RETURN_IF_ERROR(nccl_->ToStatus(nccl_->GroupStart(), "ncclGroupStart", lane.comm));
  Status status;
  for (const WireMessage& message : group) {
    const int peer = static_cast<int>(message.peer);
    const cuda::StreamRef stream = lane.stream.ref();
    const ncclResult_t result =
        message.send ? nccl_->Send(message.data, message.bytes, ncclUint8, peer, lane.comm, stream)
                     : nccl_->Recv(message.data, message.bytes, ncclUint8, peer, lane.comm, stream);
    if (status.ok()) {
      status = nccl_->ToStatus(result, message.send ? "ncclSend" : "ncclRecv", lane.comm);
    }
  }
  const ncclResult_t ended = nccl_->GroupEnd();
  WEIGHTD_RETURN_IF_ERROR(status);
  WEIGHTD_RETURN_IF_ERROR(nccl_->ToStatus(ended, "ncclGroupEnd", lane.comm));
  marked_[started_ % kMaxGroups] = false;
  lane.unmarked = started_++;
  return absl::OkStatus();
}

StatusOr<uint64_t> NcclWire::Ended() {
  for (Lane& lane : lanes_) WEIGHTD_RETURN_IF_ERROR(Settled(&lane).status());
  while (ended_ < started_ && marked_[ended_ % kMaxGroups]) {
    WEIGHTD_ASSIGN_OR_RETURN(const bool done, ends_[ended_ % kMaxGroups].Done());
    if (!done) break;
    ++ended_;
  }
  return ended_;
}

/// Every communicator in a thread of its own: NCCL may wait for the device to free what one had,
/// and so for the kernels of another that was not told to end yet.
void NcclWire::Abort() {
  std::array<Status, kWireLanes> aborted;
  {
    std::vector<std::jthread> threads;
    for (uint32_t i = 0; i < kWireLanes; ++i) {
      if (lanes_[i].comm == nullptr) continue;
      threads.emplace_back([this, i, &aborted] {
        const cuda::DeviceGuard guard(device_);
        aborted[i] = nccl_->ToStatus(nccl_->CommAbort(lanes_[i].comm), "ncclCommAbort", nullptr);
      });
    }
  }
  for (uint32_t i = 0; i < kWireLanes; ++i) {
    if (lanes_[i].comm == nullptr) continue;
    lanes_[i].comm = nullptr;
    // The kernels have been told to end: what is on the stream is over soon, whatever the peers do.
    const Status drained = lanes_[i].stream.Synchronize();
    for (const Status& status : {aborted[i], drained}) {
      if (!status.ok()) spdlog::warn("wire did not end in order: {}", Message(status));
    }
  }
}

void NcclWire::AwaitNews(microseconds limit) {
  std::this_thread::sleep_for(std::min(limit, microseconds(20)));
}

StatusOr<std::string> NcclWireMaker::MakeId() {
  std::string all;
  for (uint32_t lane = 0; lane < kWireLanes; ++lane) {
    ncclUniqueId id;
    WEIGHTD_RETURN_IF_ERROR(nccl_->ToStatus(nccl_->GetUniqueId(&id), "ncclGetUniqueId", nullptr));
    all.append(id.internal, sizeof(id.internal));
  }
  return all;
}

StatusOr<std::unique_ptr<Wire>> NcclWireMaker::Open(const std::string& id, uint32_t rank,
                                                    uint32_t size) {
  NcclWire::Ids ids{};
  constexpr size_t kIdBytes = sizeof(ids[0].internal);
  if (id.size() != kWireLanes * kIdBytes || rank >= size) {
    return Error(StatusCode::kInvalidArgument, reason::kProtocol,
                 "run daemon and worker from the same release",
                 "wire has an id that is not of NCCL: bytes={}", id.size());
  }
  for (uint32_t lane = 0; lane < kWireLanes; ++lane) {
    std::memcpy(ids[lane].internal, id.data() + lane * kIdBytes, kIdBytes);
  }
  return NcclWire::Create(nccl_, device_, ids, rank, size);
}

}  // namespace weightd
