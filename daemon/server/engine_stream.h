#pragma once

#include "daemon/server/actor_stream.h"
#include "weightd/v1/engine.grpc.pb.h"

namespace weightd {

/// weightd.v1.EngineService.
class EngineService : public v1::EngineService::CallbackService {
 public:
  explicit EngineService(ServerContext context) : context_(context) {}
  grpc::ServerBidiReactor<v1::EngineRequest, v1::EngineEvent>* Session(
      grpc::CallbackServerContext* call) override;

 private:
  ServerContext context_;
};

}  // namespace weightd
