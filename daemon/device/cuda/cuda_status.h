// The only translator of CUDA runtime errors to absl::Status.
#pragma once

#include <string_view>

#include "daemon/base/status.h"

namespace weightd::cuda {

/// OK for cudaSuccess. Otherwise "<what>: <CUDA's name and text>", and CUDA's last error of this
/// thread is cleared. `error` is a cudaError_t.
/// \error RESOURCE_EXHAUSTED GPU_MEMORY if memory ran out
/// \error UNAVAILABLE DEVICE if there is no driver, no device, or the context is lost (see
/// IsSticky) \error INTERNAL INTERNAL otherwise
Status FromCuda(int error, std::string_view what);

/// True if every later call in this context fails too, so that the process has to be replaced.
bool IsSticky(int error);

}  // namespace weightd::cuda
