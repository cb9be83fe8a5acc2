#include "daemon/device/cuda/cuda_status.h"

#include <cuda_runtime_api.h>

namespace weightd::cuda {
namespace {

bool IsAbsent(int error) {
  switch (error) {
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorInitializationError:
    case cudaErrorInvalidDevice:
    case cudaErrorDevicesUnavailable:
    case cudaErrorSystemNotReady:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice:
    case cudaErrorStubLibrary:
      return true;
    default:
      return false;
  }
}

}  // namespace

bool IsSticky(int error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorIllegalInstruction:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorHardwareStackError:
    case cudaErrorAssert:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorContained:
    case cudaErrorUnknown:
      return true;
    default:
      return false;
  }
}

Status FromCuda(int error, std::string_view what) {
  const auto code = static_cast<cudaError_t>(error);
  if (code == cudaSuccess) return absl::OkStatus();
  static_cast<void>(cudaGetLastError());
  const char* name = cudaGetErrorName(code);
  const char* text = cudaGetErrorString(code);
  if (code == cudaErrorMemoryAllocation) {
    return Error(StatusCode::kResourceExhausted, reason::kGpuMemory,
                 "free memory on the GPU, or lower what weightd may use", "{}: {} ({})", what, name,
                 text);
  }
  if (IsAbsent(error) || IsSticky(error)) {
    return Error(StatusCode::kUnavailable, reason::kDevice,
                 "look at nvidia-smi and the kernel's log; the worker is started again",
                 "{}: {} ({})", what, name, text);
  }
  return Error(StatusCode::kInternal, reason::kInternal, "report this with the log", "{}: {} ({})",
               what, name, text);
}

}  // namespace weightd::cuda
