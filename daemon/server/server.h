#pragma once

#include <functional>
#include <memory>
#include <string>

#include "daemon/server/admin_service.h"
#include "daemon/server/edge/config.h"
#include "daemon/server/edge/http_server.h"
#include "daemon/server/edge/metrics.h"
#include "daemon/server/engine_stream.h"
#include "daemon/server/version_file.h"

namespace weightd {

/// The daemon: everything between the configuration and a listening process. Members are destroyed
/// in reverse order: first the edge stops, then the jobs, then the workers. Thread safety: Create,
/// Drain and destruction from one thread.
class Server {
 public:
  /// Binds the sockets, starts the workers and serves. Does not block; ready once all of them have
  /// attached. \error UNAVAILABLE SOCKET if a socket path is in use by a living process, not
  /// writable, or a port is taken \error INVALID_ARGUMENT CONFIG / RULE_FILE from state_dir and
  /// loaders_dir
  static StatusOr<std::unique_ptr<Server>> Create(const Config& config);
  ~Server();

  /// Turns unready, refuses new work, waits for running syncs up to deadlines.drain.
  void Drain();

  uint16_t tcp_port() const { return static_cast<uint16_t>(tcp_port_); }
  uint16_t http_port() const { return http_ == nullptr ? 0 : http_->port(); }

 private:
  class Observer;
  Server(Config config, std::shared_ptr<const LoaderRegistry> loaders,
         std::unique_ptr<VersionFile> versions);
  Status Listen();
  Status StartHttp();
  WorkerSupervisors MakeSupervisors();

  const Config config_;
  Metrics metrics_;
  std::unique_ptr<VersionFile> versions_;
  std::unique_ptr<Observer> observer_;
  std::unique_ptr<Coordinator> coordinator_;
  ProcessWatcher watcher_;
  const WorkerSupervisors supervisors_;
  ActorService actors_;
  EngineService engines_;
  WorkerService workers_;
  AdminService admin_;
  std::unique_ptr<grpc::Server> grpc_;
  int tcp_port_ = 0;
  bool owns_socket_ = false;
  std::unique_ptr<HttpServer> http_;
};

/// Everything that --check-config checks beyond the syntax: rule files parse, state_dir is
/// writable, this build can serve the devices. Binds nothing.
Status CheckEnvironment(const Config& config);

}  // namespace weightd
