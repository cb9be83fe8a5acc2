#include "client/src/cuda_segments.h"

#include <fcntl.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "client/src/segments.h"

namespace weightd {
namespace {

using cuda::DevicePtr;
using cuda::Driver;
using cuda::PointerAttribute;

/// Descriptors for which room is made at a time.
constexpr size_t kDescriptorsAhead = 64;

constexpr char kRegisterAgain[] = "call register() again after tensors were moved or freed";
constexpr char kUseLendable[] =
    "allocate it with torch's default allocator or with expandable_segments:True; memory of a "
    "sleep-mode or cudaMallocAsync pool, managed memory and MIG slices cannot be mapped by another "
    "process";

DevicePtr ToDevicePtr(const void* address) { return reinterpret_cast<DevicePtr>(address); }

Status CannotLend(std::string_view why) {
  return Error(StatusCode::kUnimplemented, reason::kMemory, kUseLendable,
               "GPU memory cannot be lent: {}", why);
}

Status NotGpuMemory(DevicePtr address) {
  return Error(StatusCode::kInvalidArgument, reason::kMemoryMoved, kRegisterAgain,
               "address is not GPU memory of this process: address={:#x}", address);
}

/// Exports one allocation handle as a descriptor that children do not inherit over exec.
Status Export(const Driver& driver, cuda::AllocationHandle handle, CudaPiece* piece) {
  cuda::AllocationProperties properties;
  WEIGHTD_RETURN_IF_ERROR(
      driver.ToStatus(driver.MemGetAllocationPropertiesFromHandle(&properties, handle),
                      "cuMemGetAllocationPropertiesFromHandle"));
  if ((properties.handle_types & cuda::kHandlePosixFd) == 0) {
    return CannotLend(fmt::format("it was made without a POSIX descriptor: handle_types={}",
                                  properties.handle_types));
  }
  int fd = -1;
  const cuda::Result result =
      driver.MemExportToShareableHandle(&fd, handle, cuda::kHandlePosixFd, 0);
  if (result != cuda::kSuccess) {
    return Error(StatusCode::kResourceExhausted, reason::kFileDescriptors,
                 "raise the limit of open files (ulimit -n): every 20 MiB of an expandable segment "
                 "take a descriptor",
                 "GPU memory cannot be exported: {}",
                 Message(driver.ToStatus(result, "cuMemExportToShareableHandle")));
  }
  piece->fd = ScopedFd(fd);
  ::fcntl(fd, F_SETFD, FD_CLOEXEC);
  piece->ticket = ForkTicket(fd);
  return absl::OkStatus();
}

}  // namespace

Status CudaSegmentSet::Add(const void* address, uint64_t size_bytes) {
  if (driver_ == nullptr) driver_ = cuda::LoadedDriver();
  if (driver_ == nullptr) {
    return Error(StatusCode::kFailedPrecondition, reason::kDevice,
                 "register GPU tensors in the process that allocated them",
                 "process has not loaded the CUDA driver");
  }
  DevicePtr at = ToDevicePtr(address);
  const DevicePtr end = at + size_bytes;
  while (at < end) {
    auto known = allocations_.upper_bound(at);
    const bool inside = known != allocations_.begin() &&
                        at - std::prev(known)->first < std::prev(known)->second.size_bytes;
    if (!inside) {
      WEIGHTD_ASSIGN_OR_RETURN(CudaSegment found, Describe(at));
      known = std::next(allocations_.emplace(found.base, std::move(found)).first);
    }
    const CudaSegment& allocation = std::prev(known)->second;
    at = allocation.base + allocation.size_bytes;
    if (at < end && allocation.pieces.empty()) {
      return Error(StatusCode::kInvalidArgument, reason::kMemoryMoved, kRegisterAgain,
                   "tensor leaves its GPU allocation: address={:#x} bytes={} allocation={:#x} "
                   "allocation_bytes={}",
                   ToDevicePtr(address), size_bytes, allocation.base, allocation.size_bytes);
    }
  }
  return absl::OkStatus();
}

StatusOr<CudaSegment> CudaSegmentSet::Describe(DevicePtr address) {
  CudaSegment segment;
  WEIGHTD_RETURN_IF_ERROR(DescribeDevice(address, &segment));
  WEIGHTD_ASSIGN_OR_RETURN(const cuda::ScopedPrimaryContext current,
                           cuda::ScopedPrimaryContext::Enter(*driver_, ordinal_));
  uint32_t legacy = 0;
  driver_->GetAttribute(PointerAttribute::kIsLegacyIpcCapable, address, &legacy);
  WEIGHTD_RETURN_IF_ERROR(legacy != 0 ? DescribeAllocation(address, &segment)
                                      : DescribePiece(address, &segment));
  return segment;
}

std::string CudaSegmentSet::worker_device() const {
#ifdef WEIGHTD_FAILPOINTS
  const char* const number = std::getenv("WEIGHTD_TEST_GPU_WORKER");
  if (number != nullptr && !device_.empty()) return device_ + "." + number;
#endif
  return device_;
}

Status CudaSegmentSet::DescribeDevice(DevicePtr address, CudaSegment* segment) {
  unsigned type = 0;
  const bool known =
      driver_->GetAttribute(PointerAttribute::kMemoryType, address, &type) == cuda::kSuccess;
  uint32_t managed = 0;
  driver_->GetAttribute(PointerAttribute::kIsManaged, address, &managed);
  if (known && managed != 0) return CannotLend("it is managed memory");
  if (!known || type != cuda::kMemoryTypeDevice) return NotGpuMemory(address);
  cuda::DeviceOrdinal ordinal = 0;
  WEIGHTD_RETURN_IF_ERROR(
      driver_->ToStatus(driver_->GetAttribute(PointerAttribute::kDeviceOrdinal, address, &ordinal),
                        "cuPointerGetAttribute"));
  if (device_.empty()) {
    cuda::Uuid uuid;
    WEIGHTD_RETURN_IF_ERROR(
        driver_->ToStatus(driver_->DeviceGetUuid(&uuid, ordinal), "cuDeviceGetUuid"));
    device_ = cuda::ToString(uuid);
    ordinal_ = ordinal;
  } else if (ordinal != ordinal_) {
    return Error(StatusCode::kInvalidArgument, reason::kDevice,
                 "keep all tensors of one rank on one GPU",
                 "rank has tensors on several GPUs: ordinals={}, {}", ordinal_, ordinal);
  }
  segment->device = device_;
  return absl::OkStatus();
}

Status CudaSegmentSet::DescribeAllocation(DevicePtr address, CudaSegment* segment) const {
  size_t size = 0;
  WEIGHTD_RETURN_IF_ERROR(driver_->ToStatus(
      driver_->GetAttribute(PointerAttribute::kRangeStart, address, &segment->base),
      "cuPointerGetAttribute"));
  WEIGHTD_RETURN_IF_ERROR(
      driver_->ToStatus(driver_->GetAttribute(PointerAttribute::kRangeSize, address, &size),
                        "cuPointerGetAttribute"));
  WEIGHTD_RETURN_IF_ERROR(driver_->ToStatus(
      driver_->GetAttribute(PointerAttribute::kBufferId, segment->base, &segment->allocation),
      "cuPointerGetAttribute"));
  segment->size_bytes = size;
  const cuda::Result result = driver_->IpcGetMemHandle(&segment->handle, segment->base);
  if (result == cuda::kSuccess) return absl::OkStatus();
  return CannotLend(Message(driver_->ToStatus(result, "cuIpcGetMemHandle")));
}

Status CudaSegmentSet::DescribePiece(DevicePtr address, CudaSegment* segment) {
  void* pool = nullptr;
  driver_->GetAttribute(PointerAttribute::kMempoolHandle, address, &pool);
  if (pool != nullptr) return CannotLend("it belongs to a memory pool (cudaMallocAsync)");
  if (num_pieces_++ % kDescriptorsAhead == 0) {
    WEIGHTD_RETURN_IF_ERROR(EnsureDescriptors(kDescriptorsAhead));
  }
  cuda::AllocationHandle handle = 0;
  // NOLINTNEXTLINE(performance-no-int-to-ptr): the driver's addresses are integers
  auto* const memory = reinterpret_cast<void*>(address);
  const cuda::Result retained = driver_->MemRetainAllocationHandle(&handle, memory);
  if (retained != cuda::kSuccess) {
    return CannotLend(Message(driver_->ToStatus(retained, "cuMemRetainAllocationHandle")));
  }
  CudaPiece piece;
  const Status exported = Export(*driver_, handle, &piece);
  driver_->MemRelease(handle);  // the descriptor keeps the allocation
  WEIGHTD_RETURN_IF_ERROR(exported);
  size_t size = 0;
  WEIGHTD_RETURN_IF_ERROR(driver_->ToStatus(
      driver_->GetAttribute(PointerAttribute::kMappingBase, address, &segment->base),
      "cuPointerGetAttribute"));
  WEIGHTD_RETURN_IF_ERROR(
      driver_->ToStatus(driver_->GetAttribute(PointerAttribute::kMappingSize, address, &size),
                        "cuPointerGetAttribute"));
  piece.size_bytes = segment->size_bytes = size;
  segment->pieces.push_back(std::move(piece));
  return absl::OkStatus();
}

void CudaSegmentSet::Seal() {
  for (auto& [base, allocation] : allocations_) {
    CudaSegment* last = segments_.empty() ? nullptr : &segments_.back();
    const bool joins = last != nullptr && !last->pieces.empty() && !allocation.pieces.empty() &&
                       last->base + last->size_bytes == base;
    if (!joins) {
      segments_.push_back(std::move(allocation));
      continue;
    }
    last->size_bytes += allocation.size_bytes;
    for (CudaPiece& piece : allocation.pieces) last->pieces.push_back(std::move(piece));
  }
  allocations_.clear();
}

CudaSegmentSet::Place CudaSegmentSet::Find(const void* address) const {
  const DevicePtr at = ToDevicePtr(address);
  const auto after = std::upper_bound(
      segments_.begin(), segments_.end(), at,
      [](DevicePtr value, const CudaSegment& segment) { return value < segment.base; });
  WEIGHTD_CHECK(after != segments_.begin());
  const auto index = static_cast<uint32_t>(after - segments_.begin() - 1);
  return {index, at - segments_[index].base};
}

Status CudaSegmentSet::CheckAlive() const {
  for (const CudaSegment& segment : segments_) {
    if (!segment.pieces.empty()) continue;  // our descriptors keep it
    uint64_t allocation = 0;
    const bool known = driver_->GetAttribute(PointerAttribute::kBufferId, segment.base,
                                             &allocation) == cuda::kSuccess;
    if (known && allocation == segment.allocation) continue;
    return Error(StatusCode::kFailedPrecondition, reason::kMemoryMoved, kRegisterAgain,
                 "lent GPU memory was freed: address={:#x} bytes={}", segment.base,
                 segment.size_bytes);
  }
  return absl::OkStatus();
}

}  // namespace weightd
