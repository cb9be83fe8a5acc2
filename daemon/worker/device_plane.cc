#include "daemon/worker/device_plane.h"

#include "daemon/transport/shm/shm_transport.h"
#if WEIGHTD_HAS_CUDA
#include "daemon/device/cuda/segment_mapping.h"
#include "daemon/transport/ipc/ipc_transport.h"
#endif

namespace weightd {
namespace {

StatusOr<DevicePlane> MakeGpuPlane(const std::string& device) {
#if WEIGHTD_HAS_CUDA
  DevicePlane plane;
  WEIGHTD_ASSIGN_OR_RETURN(const std::shared_ptr<const cuda::WorkerContext> context,
                           cuda::WorkerContext::Create(device));
  plane.mapper = std::make_shared<cuda::CudaSegmentMapper>(context);
  WEIGHTD_ASSIGN_OR_RETURN(plane.transport,
                           IpcTransport::Create(cuda::DeviceId{context->ordinal()}));
  return plane;
#else
  return Error(StatusCode::kUnimplemented, reason::kDevice,
               "use a build of weightd with WEIGHTD_CUDA=ON",
               "this build has no GPU data plane: device={}", device);
#endif
}

}  // namespace

StatusOr<DevicePlane> MakeDevicePlane(const std::string& device, int num_threads) {
  if (!device.starts_with("host")) return MakeGpuPlane(device);
  DevicePlane plane;
  plane.mapper = std::make_shared<HostSegmentMapper>();
  plane.transport = std::make_unique<ShmTransport>(ShmOptions{.num_threads = num_threads});
  return plane;
}

}  // namespace weightd
