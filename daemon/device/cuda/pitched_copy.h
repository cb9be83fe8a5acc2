// Copies by the GPU's copy engine: faster than kernels over NVLink, and no multiprocessor is busy.
#pragma once

#include <cstddef>

#include "daemon/base/status.h"
#include "daemon/device/cuda/box_table.h"
#include "daemon/device/cuda/handles.h"

namespace weightd::cuda {

/// Copies rows between memories that `device` can reach, in stream order. Returns at once.
Status CopyPitched(const PitchedCopy& copy, const std::byte* from, std::byte* to, DeviceId device,
                   StreamRef stream);

}  // namespace weightd::cuda
