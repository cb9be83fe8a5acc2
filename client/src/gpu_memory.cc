#include "client/src/gpu_memory.h"

#include "client/src/cuda_segments.h"
#include "daemon/device/cuda/driver.h"

namespace weightd {
namespace {

using cuda::DevicePtr;
using cuda::Driver;
using cuda::PointerAttribute;

StatusOr<cuda::DeviceOrdinal> OrdinalOf(const Driver* driver, DevicePtr address) {
  if (driver == nullptr) {
    return Error(StatusCode::kFailedPrecondition, reason::kDevice,
                 "call it in the process that allocated the memory",
                 "process has not loaded the CUDA driver");
  }
  unsigned type = 0;  // of an address without pages there is none
  cuda::DeviceOrdinal ordinal = 0;
  if (driver->GetAttribute(PointerAttribute::kMemoryType, address, &type) == cuda::kSuccess &&
      type == cuda::kMemoryTypeDevice &&
      driver->GetAttribute(PointerAttribute::kDeviceOrdinal, address, &ordinal) == cuda::kSuccess) {
    return ordinal;
  }
  return Error(StatusCode::kInvalidArgument, reason::kMemoryMoved, "pass memory that is in use",
               "address is not GPU memory of this process: address={:#x}", address);
}

}  // namespace

Status CheckLendable(const void* address, uint64_t size_bytes) {
  if (size_bytes > 0) return CudaSegmentSet().Add(address, size_bytes);
  return OrdinalOf(cuda::LoadedDriver(), reinterpret_cast<DevicePtr>(address)).status();
}

StatusOr<void*> AllocateLendable(const void* like, uint64_t size_bytes) {
  const Driver* driver = cuda::LoadedDriver();
  WEIGHTD_ASSIGN_OR_RETURN(const cuda::DeviceOrdinal ordinal,
                           OrdinalOf(driver, reinterpret_cast<DevicePtr>(like)));
  WEIGHTD_ASSIGN_OR_RETURN(const cuda::ScopedPrimaryContext current,
                           cuda::ScopedPrimaryContext::Enter(*driver, ordinal));
  DevicePtr address = 0;
  const cuda::Result result = driver->MemAlloc(&address, size_bytes);
  if (result == cuda::kOutOfMemory) {
    size_t free = 0;
    size_t total = 0;
    driver->MemGetInfo(&free, &total);
    return Error(StatusCode::kResourceExhausted, reason::kGpuMemory,
                 "free GPU memory (torch.cuda.empty_cache() gives back what torch keeps), or lower "
                 "stage_bytes",
                 "GPU has no room for the stage of parameters that are pulled: needed_bytes={} "
                 "free_bytes={}",
                 size_bytes, free);
  }
  WEIGHTD_RETURN_IF_ERROR(driver->ToStatus(result, "cuMemAlloc"));
  // NOLINTNEXTLINE(performance-no-int-to-ptr): the driver's addresses are integers
  return reinterpret_cast<void*>(address);
}

void FreeLendable(void* address) {
  const auto pointer = reinterpret_cast<DevicePtr>(address);
  const Driver* driver = cuda::LoadedDriver();
  const StatusOr<cuda::DeviceOrdinal> ordinal = OrdinalOf(driver, pointer);
  if (!ordinal.ok()) return;  // the process is ending, and the driver has freed it
  const StatusOr<cuda::ScopedPrimaryContext> current =
      cuda::ScopedPrimaryContext::Enter(*driver, *ordinal);
  if (current.ok()) driver->MemFree(pointer);
}

}  // namespace weightd
