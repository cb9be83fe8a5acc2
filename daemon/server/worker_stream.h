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
  WorkerService(ServerContext context, WorkerSupervisor& supervisor)
      : context_(context), supervisor_(supervisor) {}
  grpc::ServerBidiReactor<v1::WorkerReport, v1::WorkerCommand>* Attach(
      grpc::CallbackServerContext* call) override;

  /// Bytes that the attached worker maps, and for how many members.
  std::pair<uint64_t, uint32_t> Mapped();

 private:
  friend class WorkerStream;
  ServerContext context_;
  WorkerSupervisor& supervisor_;
  std::mutex mu_;
  std::map<uint64_t, uint64_t> mapped_;  // member -> bytes; guarded by mu_
};

}  // namespace weightd
