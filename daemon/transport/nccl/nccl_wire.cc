#include "daemon/transport/nccl/nccl_wire.h"

#include <cstring>
#include <thread>

#include "daemon/base/log.h"
#include "daemon/device/cuda/device.h"

namespace weightd {

StatusOr<std::unique_ptr<NcclWire>> NcclWire::Create(const NcclLibrary* nccl, cuda::DeviceId device,
                                                     const ncclUniqueId& id, uint32_t rank,
                                                     uint32_t size) {
  std::unique_ptr<NcclWire> wire(new NcclWire(nccl, device));
  WEIGHTD_ASSIGN_OR_RETURN(wire->stream_, cuda::Stream::Create(device, true));
  for (cuda::Event& end : wire->ends_) {
    WEIGHTD_ASSIGN_OR_RETURN(end, cuda::Event::Create(device));
  }
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  config.maxCTAs = kMaxNcclCtas;
  const cuda::DeviceGuard guard(device);
  WEIGHTD_RETURN_IF_ERROR(
      nccl->ToStatus(nccl->CommInitRankConfig(&wire->comm_, static_cast<int>(size), id,
                                              static_cast<int>(rank), &config),
                     "ncclCommInitRankConfig", nullptr));
  return wire;
}

NcclWire::~NcclWire() { Abort(); }

/// True if the communicator has done what was asked of it last; then ends of groups are marked.
StatusOr<bool> NcclWire::Settled() {
  ncclResult_t state = ncclSuccess;
  const ncclResult_t asked = nccl_->CommGetAsyncError(comm_, &state);
  WEIGHTD_RETURN_IF_ERROR(nccl_->ToStatus(asked, "ncclCommGetAsyncError", comm_));
  WEIGHTD_RETURN_IF_ERROR(nccl_->ToStatus(state, "communicator", comm_));
  if (state == ncclInProgress) return false;
  while (recorded_ < started_) {
    WEIGHTD_RETURN_IF_ERROR(ends_[recorded_ % kMaxGroups].Record(stream_.ref()));
    ++recorded_;
  }
  return true;
}

Status NcclWire::Start(std::span<const WireMessage> group) {
  WEIGHTD_CHECK(recorded_ == started_ && started_ - ended_ < kMaxGroups);
  const cuda::DeviceGuard guard(device_);
  WEIGHTD_RETURN_IF_ERROR(nccl_->ToStatus(nccl_->GroupStart(), "ncclGroupStart", comm_));
  Status status;
  for (const WireMessage& message : group) {
    const int peer = static_cast<int>(message.peer);
    const ncclResult_t result =
        message.send
            ? nccl_->Send(message.data, message.bytes, ncclUint8, peer, comm_, stream_.ref())
            : nccl_->Recv(message.data, message.bytes, ncclUint8, peer, comm_, stream_.ref());
    if (status.ok()) {
      status = nccl_->ToStatus(result, message.send ? "ncclSend" : "ncclRecv", comm_);
    }
  }
  const ncclResult_t ended = nccl_->GroupEnd();
  WEIGHTD_RETURN_IF_ERROR(status);
  WEIGHTD_RETURN_IF_ERROR(nccl_->ToStatus(ended, "ncclGroupEnd", comm_));
  ++started_;
  return absl::OkStatus();
}

StatusOr<uint64_t> NcclWire::Ended() {
  WEIGHTD_RETURN_IF_ERROR(Settled().status());
  while (ended_ < recorded_) {
    WEIGHTD_ASSIGN_OR_RETURN(const bool done, ends_[ended_ % kMaxGroups].Done());
    if (!done) break;
    ++ended_;
  }
  return ended_;
}

void NcclWire::Abort() {
  if (comm_ == nullptr) return;
  const cuda::DeviceGuard guard(device_);
  const Status aborted = nccl_->ToStatus(nccl_->CommAbort(comm_), "ncclCommAbort", nullptr);
  comm_ = nullptr;
  // The kernels have been told to end: what is on the stream is over soon, whatever the peers do.
  const Status drained = stream_.Synchronize();
  for (const Status& status : {aborted, drained}) {
    if (!status.ok()) spdlog::warn("wire did not end in order: {}", Message(status));
  }
}

void NcclWire::AwaitNews(microseconds limit) {
  std::this_thread::sleep_for(std::min(limit, microseconds(20)));
}

StatusOr<std::string> NcclWireMaker::MakeId() {
  ncclUniqueId id;
  WEIGHTD_RETURN_IF_ERROR(nccl_->ToStatus(nccl_->GetUniqueId(&id), "ncclGetUniqueId", nullptr));
  return std::string(id.internal, sizeof(id.internal));
}

StatusOr<std::unique_ptr<Wire>> NcclWireMaker::Open(const std::string& id, uint32_t rank,
                                                    uint32_t size) {
  ncclUniqueId unique{};
  if (id.size() != sizeof(unique.internal) || rank >= size) {
    return Error(StatusCode::kInvalidArgument, reason::kProtocol,
                 "run daemon and worker from the same release",
                 "wire has an id that is not of NCCL: bytes={}", id.size());
  }
  std::memcpy(unique.internal, id.data(), id.size());
  return NcclWire::Create(nccl_, device_, unique, rank, size);
}

}  // namespace weightd
