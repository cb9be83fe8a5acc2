#include "daemon/device/cuda/pitched_copy.h"

#include <cuda_runtime_api.h>

#include "daemon/device/cuda/cuda_status.h"
#include "daemon/device/cuda/device.h"

namespace weightd::cuda {

Status CopyPitched(const PitchedCopy& copy, const std::byte* from, std::byte* to, DeviceId device,
                   StreamRef stream) {
  const DeviceGuard guard(device);
  const cudaError_t error =
      copy.rows == 1 ? cudaMemcpyAsync(to, from, copy.row_bytes, cudaMemcpyDefault, stream)
                     : cudaMemcpy2DAsync(to, copy.to_pitch, from, copy.from_pitch, copy.row_bytes,
                                         copy.rows, cudaMemcpyDefault, stream);
  return FromCuda(error, "the copy engine refused a copy");
}

}  // namespace weightd::cuda
