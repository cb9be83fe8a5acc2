#include "daemon/worker/device_plane.h"

#include <cstdlib>

#include "daemon/plan/data_path.h"
#include "daemon/transport/shm/shm_transport.h"
#include "daemon/transport/socket/socket_wire.h"
#include "daemon/transport/wire/host_stage.h"
#if WEIGHTD_HAS_CUDA
#include "daemon/device/cuda/segment_mapping.h"
#include "daemon/transport/ipc/ipc_transport.h"
#endif
#if WEIGHTD_HAS_NCCL
#include "daemon/transport/nccl/gpu_stage.h"
#include "daemon/transport/nccl/nccl_wire.h"
#endif

namespace weightd {
namespace {

#if WEIGHTD_HAS_CUDA
/// Without NCCL the worker goes on, and says why it takes part in no wire.
Status AddWires([[maybe_unused]] cuda::DeviceId ordinal, DevicePlane* plane) {
#if WEIGHTD_HAS_NCCL
  const StatusOr<const NcclLibrary*> nccl = LoadNccl();
  if (!nccl.ok()) {
    plane->nccl_problem = Message(nccl.status());
    return absl::OkStatus();
  }
  plane->nccl_version = static_cast<uint32_t>((*nccl)->version);
  WEIGHTD_ASSIGN_OR_RETURN(std::unique_ptr<GpuStage> stage, GpuStage::Create(ordinal));
  plane->transports.wires = std::make_unique<WireTransport>(
      std::make_unique<NcclWireMaker>(*nccl, ordinal), std::move(stage));
#else
  plane->nccl_problem = "this build has no NCCL";
#endif
  return absl::OkStatus();
}
#endif

StatusOr<DevicePlane> MakeGpuPlane(const std::string& device) {
#if WEIGHTD_HAS_CUDA
  DevicePlane plane;
  WEIGHTD_ASSIGN_OR_RETURN(const std::shared_ptr<const cuda::WorkerContext> context,
                           cuda::WorkerContext::Create(std::string(GpuOf(device))));
  plane.mapper = std::make_shared<cuda::CudaSegmentMapper>(context);
  WEIGHTD_ASSIGN_OR_RETURN(plane.transports.direct,
                           IpcTransport::Create(cuda::DeviceId{context->ordinal()}));
  WEIGHTD_ASSIGN_OR_RETURN(plane.transports.verifier,
                           IpcTransport::Create(cuda::DeviceId{context->ordinal()}));
  WEIGHTD_RETURN_IF_ERROR(AddWires(cuda::DeviceId{context->ordinal()}, &plane));
  WEIGHTD_ASSIGN_OR_RETURN(const std::vector<std::string> all,
                           cuda::ListDevices(context->driver()));
  for (const std::string& other : all) {
    if (other != context->uuid() && context->CheckReach(other).ok()) plane.peers.push_back(other);
  }
  return plane;
#else
  return Error(StatusCode::kUnimplemented, reason::kDevice,
               "use a build of weightd with WEIGHTD_CUDA=ON",
               "this build has no GPU data plane: device={}", device);
#endif
}

}  // namespace

void PrepareEnvironment([[maybe_unused]] const std::string& device) {
#if WEIGHTD_HAS_NCCL
  SetNcclEnvironment();
#endif
#ifdef WEIGHTD_FAILPOINTS
  // NCCL tells machines apart by this: two workers of one GPU, which it would refuse, are two
  // machines to it, and talk over TCP.
  if (IsGpuDevice(device) && GpuOf(device) != device) {
    ::setenv("NCCL_HOSTID", device.c_str(), 1);
  }
#endif
}

StatusOr<DevicePlane> MakeDevicePlane(const std::string& device, int num_threads) {
  if (!device.starts_with("host")) return MakeGpuPlane(device);
  DevicePlane plane;
  plane.mapper = std::make_shared<HostSegmentMapper>();
  plane.transports.direct = std::make_unique<ShmTransport>(ShmOptions{.num_threads = num_threads});
  plane.transports.verifier =
      std::make_unique<ShmTransport>(ShmOptions{.num_threads = num_threads});
  plane.transports.wires = std::make_unique<WireTransport>(std::make_unique<SocketWireMaker>(),
                                                           std::make_unique<HostStage>());
  return plane;
}

}  // namespace weightd
