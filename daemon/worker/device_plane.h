// What a worker of one device is made of: how it maps memory and how it moves bytes.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/device/segment.h"
#include "daemon/worker/worker_core.h"

namespace weightd {

struct DevicePlane {
  std::shared_ptr<SegmentMapper> mapper;  ///< shared with the member table's options
  WorkerCore::Transports transports;
  uint32_t nccl_version = 0;       ///< 0: none
  std::string nccl_problem;        ///< why
  std::vector<std::string> peers;  ///< GPUs whose memory this one can access
};

/// Sets what NCCL reads from the environment: no multicast objects on a shared machine. \pre no
/// other thread is running
void PrepareEnvironment(const std::string& device);

/// The plane of a device: "host", "host.N" or the UUID of a GPU. For a GPU this makes its context
/// in this process. `num_threads` copy on the host; 0: as many as the process may use. \error
/// UNIMPLEMENTED DEVICE for a GPU if this build has no GPU data plane \error NOT_FOUND DEVICE for
/// an unknown UUID, and whatever the driver says
StatusOr<DevicePlane> MakeDevicePlane(const std::string& device, int num_threads);

}  // namespace weightd
