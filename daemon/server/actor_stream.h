#pragma once

#include <memory>
#include <optional>

#include "daemon/server/process_watcher.h"
#include "daemon/server/stream.h"
#include "daemon/sync/coordinator.h"
#include "weightd/v1/actor.grpc.pb.h"

namespace weightd {

/// What the services share. Outlives every stream.
struct ServerContext {
  Coordinator& coordinator;
  ProcessWatcher& watcher;
  uint64_t max_message_bytes = 0;
};

/// weightd.v1.ActorService.
class ActorService : public v1::ActorService::CallbackService {
 public:
  explicit ActorService(ServerContext context) : context_(context) {}
  grpc::ServerBidiReactor<v1::ActorRequest, v1::ActorEvent>* Session(
      grpc::CallbackServerContext* call) override;

 private:
  ServerContext context_;
};

}  // namespace weightd
