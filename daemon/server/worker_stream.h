#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "daemon/server/actor_stream.h"
#include "daemon/server/worker_supervisor.h"
#include "weightd/v1/worker.grpc.pb.h"

namespace weightd {

/// weightd.v1.WorkerService: one stream per attached worker.
class WorkerService : public v1::WorkerService::CallbackService {
 public:
  WorkerService(ServerContext context, const WorkerSupervisors& supervisors)
      : context_(context), supervisors_(supervisors) {}
  grpc::ServerBidiReactor<v1::WorkerReport, v1::WorkerCommand>* Attach(
      grpc::CallbackServerContext* call) override;

  /// Bytes that the attached worker of this device maps, and for how many members.
  std::pair<uint64_t, uint32_t> Mapped(const std::string& device);

 private:
  friend class WorkerStream;
  ServerContext context_;
  const WorkerSupervisors& supervisors_;
  std::mutex mu_;
  // device -> member -> bytes; guarded by mu_
  std::map<std::string, std::map<uint64_t, uint64_t>> mapped_;
};

}  // namespace weightd
