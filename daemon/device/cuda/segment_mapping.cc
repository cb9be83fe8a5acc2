#include "daemon/device/cuda/segment_mapping.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace weightd::cuda {
namespace {

constexpr char kUpgrade[] = "use the client library of this release";
constexpr char kShareNamespace[] =
    "run trainer, engines and weightd in one PID and IPC namespace and give all of them the same "
    "GPUs, and keep the tensors allocated while they are registered";

// NOLINTNEXTLINE(performance-no-int-to-ptr): the driver's addresses are integers
std::byte* ToPointer(DevicePtr address) { return reinterpret_cast<std::byte*>(address); }

/// Adds who lent the memory and what to do about it.
Status CannotMap(const Status& cause, const std::string& label) {
  const bool full = cause.code() == StatusCode::kResourceExhausted;
  return Error(full ? StatusCode::kResourceExhausted : StatusCode::kInvalidArgument,
               reason::kMemory, full ? "free memory on the worker's GPU" : kShareNamespace,
               "GPU memory cannot be mapped: {}: {}", label, Message(cause));
}

/// A whole allocation, opened by its legacy handle.
class IpcSegment final : public LentSegment {
 public:
  IpcSegment(std::shared_ptr<const WorkerContext> context, DevicePtr base, uint64_t size_bytes)
      : context_(std::move(context)), base_(base), size_bytes_(size_bytes) {}
  ~IpcSegment() override {
    const Driver& driver = context_->driver();
    const auto current = ScopedPrimaryContext::Enter(driver, context_->ordinal());
    if (current.ok()) driver.IpcCloseMemHandle(base_);
  }
  std::byte* data() const override { return ToPointer(base_); }
  uint64_t size_bytes() const override { return size_bytes_; }
  Status CheckIntact(bool) const override { return absl::OkStatus(); }

 private:
  const std::shared_ptr<const WorkerContext> context_;  ///< outlives what is mapped in it
  const DevicePtr base_;
  const uint64_t size_bytes_;
};

/// A reserved range into which pieces are mapped one after the other.
class PiecedSegment final : public LentSegment {
 public:
  static StatusOr<std::shared_ptr<PiecedSegment>> Create(
      std::shared_ptr<const WorkerContext> context, const SegmentOffer& offer) {
    DevicePtr base = 0;
    const Driver& driver = context->driver();
    const Result result = driver.MemAddressReserve(&base, offer.size_bytes, 0, 0, 0);
    if (result != kSuccess) {
      return CannotMap(driver.ToStatus(result, "cuMemAddressReserve"), offer.label);
    }
    return std::make_shared<PiecedSegment>(std::move(context), base, offer.size_bytes,
                                           offer.device);
  }
  PiecedSegment(std::shared_ptr<const WorkerContext> context, DevicePtr base, uint64_t size_bytes,
                std::string device)
      : context_(std::move(context)),
        base_(base),
        size_bytes_(size_bytes),
        device_(std::move(device)) {}
  ~PiecedSegment() override {
    const Driver& driver = context_->driver();
    const auto current = ScopedPrimaryContext::Enter(driver, context_->ordinal());
    if (!current.ok()) return;
    for (const auto& [offset, size] : pieces_) driver.MemUnmap(base_ + offset, size);
    driver.MemAddressFree(base_, size_bytes_);
  }

  Status Append(const SegmentOffer& offer) {
    if (offer.fds.size() != offer.piece_bytes.size() || offer.size_bytes != size_bytes_ ||
        offer.device != device_) {
      return Malformed(offer);
    }
    for (size_t i = 0; i < offer.fds.size(); ++i) {
      if (offer.piece_bytes[i] == 0 || offer.piece_bytes[i] > size_bytes_ - mapped_bytes_) {
        return Malformed(offer);
      }
      const Status mapped = MapPiece(offer.fds[i].get(), offer.piece_bytes[i]);
      if (!mapped.ok()) return CannotMap(mapped, offer.label);
    }
    return absl::OkStatus();
  }

  std::byte* data() const override { return ToPointer(base_); }
  uint64_t size_bytes() const override { return size_bytes_; }
  bool complete() const override { return mapped_bytes_ == size_bytes_; }
  Status CheckIntact(bool) const override { return absl::OkStatus(); }

 private:
  static Status Malformed(const SegmentOffer& offer) {
    return Error(StatusCode::kInvalidArgument, reason::kProtocol, kUpgrade,
                 "pieces do not fit their segment: {} descriptors={} pieces={} size_bytes={}",
                 offer.label, offer.fds.size(), offer.piece_bytes.size(), offer.size_bytes);
  }

  Status MapPiece(int fd, uint64_t size) {
    const Driver& driver = context_->driver();
    AllocationHandle handle = 0;
    // NOLINTNEXTLINE(performance-no-int-to-ptr): the driver takes the descriptor in place of one
    void* os_handle = reinterpret_cast<void*>(static_cast<intptr_t>(fd));
    WEIGHTD_RETURN_IF_ERROR(
        driver.ToStatus(driver.MemImportFromShareableHandle(&handle, os_handle, kHandlePosixFd),
                        "cuMemImportFromShareableHandle"));
    const DevicePtr at = base_ + mapped_bytes_;
    const Status mapped = driver.ToStatus(driver.MemMap(at, size, 0, handle, 0), "cuMemMap");
    driver.MemRelease(handle);  // the mapping keeps the memory
    WEIGHTD_RETURN_IF_ERROR(mapped);
    pieces_.emplace_back(mapped_bytes_, size);
    AccessDescription access;
    access.location = {kLocationDevice, context_->ordinal()};
    access.flags = kAccessReadWrite;
    WEIGHTD_RETURN_IF_ERROR(
        driver.ToStatus(driver.MemSetAccess(at, size, &access, 1), "cuMemSetAccess"));
    mapped_bytes_ += size;
    return absl::OkStatus();
  }

  const std::shared_ptr<const WorkerContext> context_;  ///< outlives what is mapped in it
  const DevicePtr base_;
  const uint64_t size_bytes_;
  const std::string device_;
  uint64_t mapped_bytes_ = 0;
  std::vector<std::pair<uint64_t, uint64_t>> pieces_;  ///< (offset, size) that are mapped
};

/// An event of the lender.
class EventFence final : public LenderFence {
 public:
  EventFence(std::shared_ptr<const WorkerContext> context, CUevent_st* event, std::string label)
      : context_(std::move(context)), event_(event), label_(std::move(label)) {}
  ~EventFence() override {
    const Driver& driver = context_->driver();
    const auto current = ScopedPrimaryContext::Enter(driver, context_->ordinal());
    if (current.ok()) driver.EventDestroy(event_);
  }
  StatusOr<bool> Passed() const override {
    const Driver& driver = context_->driver();
    WEIGHTD_ASSIGN_OR_RETURN(const ScopedPrimaryContext current,
                             ScopedPrimaryContext::Enter(driver, context_->ordinal()));
    const Result result = driver.EventQuery(event_);
    if (result == kNotReady) return false;
    WEIGHTD_RETURN_IF_ERROR(WithRank(driver.ToStatus(result, "cuEventQuery"), label_));
    return true;
  }

 private:
  const std::shared_ptr<const WorkerContext> context_;  ///< outlives what is opened in it
  CUevent_st* const event_;
  const std::string label_;
};

}  // namespace

StatusOr<std::shared_ptr<const WorkerContext>> WorkerContext::Create(const std::string& uuid) {
  WEIGHTD_ASSIGN_OR_RETURN(const Driver* driver, LoadDriver());
  WEIGHTD_ASSIGN_OR_RETURN(const DeviceOrdinal ordinal, FindDevice(*driver, uuid));
  CUctx_st* context = nullptr;
  WEIGHTD_RETURN_IF_ERROR(driver->ToStatus(driver->DevicePrimaryCtxRetain(&context, ordinal),
                                           "cuDevicePrimaryCtxRetain"));
  return std::shared_ptr<const WorkerContext>(new WorkerContext(driver, ordinal, uuid));
}

WorkerContext::~WorkerContext() { driver_->DevicePrimaryCtxRelease(ordinal_); }

Status WorkerContext::CheckReach(const std::string& uuid) const {
  if (uuid == uuid_) return absl::OkStatus();
  const StatusOr<DeviceOrdinal> peer = FindDevice(*driver_, uuid);
  int can = 0;
  if (peer.ok()) {
    WEIGHTD_RETURN_IF_ERROR(driver_->ToStatus(driver_->DeviceCanAccessPeer(&can, ordinal_, *peer),
                                              "cuDeviceCanAccessPeer"));
  }
  if (can != 0) return absl::OkStatus();
  return Error(StatusCode::kInvalidArgument, reason::kDevice,
               "use GPUs that are joined by NVLink or PCIe peer access (nvidia-smi topo -p2p rw), "
               "and give weightd all of them",
               "GPU cannot reach the memory of another: worker={} memory={} cause={}", uuid_, uuid,
               peer.ok() ? "no peer access" : Message(peer.status()));
}

StatusOr<std::shared_ptr<LentSegment>> CudaSegmentMapper::Map(SegmentOffer offer,
                                                              std::shared_ptr<LentSegment> held) {
  if (offer.kind == SegmentOffer::Kind::kSharedMemory) {
    return Error(
        StatusCode::kInvalidArgument, reason::kDevice, "keep all tensors of one rank on one GPU",
        "worker of a GPU was offered host memory: {} device={}", offer.label, context_->uuid());
  }
  WEIGHTD_RETURN_IF_ERROR(context_->CheckReach(offer.device));
  WEIGHTD_ASSIGN_OR_RETURN(const ScopedPrimaryContext current,
                           ScopedPrimaryContext::Enter(context_->driver(), context_->ordinal()));
  if (offer.kind == SegmentOffer::Kind::kCudaIpc) return MapAllocation(offer);
  auto segment = std::dynamic_pointer_cast<PiecedSegment>(held);
  if (segment == nullptr || segment->complete()) {
    WEIGHTD_ASSIGN_OR_RETURN(segment, PiecedSegment::Create(context_, offer));
  }
  WEIGHTD_RETURN_IF_ERROR(segment->Append(offer));
  return std::shared_ptr<LentSegment>(std::move(segment));
}

StatusOr<std::shared_ptr<LentSegment>> CudaSegmentMapper::MapAllocation(const SegmentOffer& offer) {
  IpcHandle handle;
  if (offer.ipc_handle.size() != handle.bytes.size() || !offer.fds.empty()) {
    return Error(StatusCode::kInvalidArgument, reason::kProtocol, kUpgrade,
                 "handle of an allocation is malformed: {} bytes={} descriptors={}", offer.label,
                 offer.ipc_handle.size(), offer.fds.size());
  }
  const std::string identity = offer.ipc_handle + std::to_string(offer.allocation);
  std::erase_if(allocations_, [](const auto& entry) { return entry.second.expired(); });
  const auto known = allocations_.find(identity);
  if (known != allocations_.end()) {
    auto segment = known->second.lock();
    if (segment != nullptr && segment->size_bytes() == offer.size_bytes) return segment;
  }
  std::copy(offer.ipc_handle.begin(), offer.ipc_handle.end(), handle.bytes.begin());
  const Driver& driver = context_->driver();
  DevicePtr base = 0;
  const Result opened = driver.IpcOpenMemHandle(&base, handle, kIpcLazyEnablePeerAccess);
  if (opened != kSuccess) {
    return CannotMap(driver.ToStatus(opened, "cuIpcOpenMemHandle"), offer.label);
  }
  auto segment = std::make_shared<IpcSegment>(context_, base, offer.size_bytes);
  size_t mapped_bytes = 0;
  WEIGHTD_RETURN_IF_ERROR(
      driver.ToStatus(driver.GetAttribute(PointerAttribute::kRangeSize, base, &mapped_bytes),
                      "cuPointerGetAttribute"));
  if (mapped_bytes < offer.size_bytes) {
    return Error(StatusCode::kInvalidArgument, reason::kMemory, kUpgrade,
                 "GPU allocation is smaller than claimed: {} claimed_bytes={} size_bytes={}",
                 offer.label, offer.size_bytes, mapped_bytes);
  }
  allocations_[identity] = segment;
  return std::shared_ptr<LentSegment>(std::move(segment));
}

StatusOr<std::shared_ptr<const LenderFence>> CudaSegmentMapper::OpenFence(
    const std::string& handle, const std::string& label) {
  IpcHandle event_handle;
  if (handle.size() != event_handle.bytes.size()) {
    return Error(StatusCode::kInvalidArgument, reason::kProtocol, kUpgrade,
                 "handle of an event is malformed: {} bytes={}", label, handle.size());
  }
  std::copy(handle.begin(), handle.end(), event_handle.bytes.begin());
  const Driver& driver = context_->driver();
  WEIGHTD_ASSIGN_OR_RETURN(const ScopedPrimaryContext current,
                           ScopedPrimaryContext::Enter(driver, context_->ordinal()));
  CUevent_st* event = nullptr;
  const Result opened = driver.IpcOpenEventHandle(&event, event_handle);
  if (opened != kSuccess) {
    return CannotMap(driver.ToStatus(opened, "cuIpcOpenEventHandle"), label);
  }
  return std::make_shared<EventFence>(context_, event, label);
}

}  // namespace weightd::cuda
