#include "daemon/server/server.h"

#include <grpcpp/health_check_service_interface.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "daemon/base/log.h"
#include "daemon/base/version.h"

namespace weightd {
namespace {

SyncOptions SyncOptionsOf(const Config& config) {
  SyncOptions options;
  options.admit = config.deadlines.admit;
  options.prepare = config.deadlines.prepare;
  options.transfer = config.deadlines.transfer;
  options.verify = config.deadlines.verify;
  options.commit = config.deadlines.commit;
  options.window = {config.limits.window_bytes,
                    static_cast<uint32_t>(config.limits.window_operations)};
  options.retain_on_host = config.catch_up.retain == "host";
  options.catch_up = config.catch_up.enabled;
  options.always_wire = config.worker.path == kWirePath;
  options.wire_bytes = config.worker.wire_bytes;
  options.verify_when = config.worker.verify == kVerifyBeside  ? VerifyWhen::kBeside
                        : config.worker.verify == kVerifyAfter ? VerifyWhen::kAfter
                                                               : VerifyWhen::kAuto;
  return options;
}

WorkerSettings WorkerSettingsOf(const Config& config) {
  WorkerSettings settings;
  settings.threads = config.worker.threads;
  settings.peer_check = config.worker.peer_check;
  settings.register_within = config.deadlines.registration;
  settings.restart_backoff = config.worker.restart_backoff;
  settings.log_level = config.runtime.log_level;
  settings.log_format = config.runtime.log_format;
  return settings;
}

Status SocketError(const std::string& path, const std::string& what, const std::string& remedy) {
  return Error(StatusCode::kUnavailable, reason::kSocket, remedy, "cannot listen on {}: {}", path,
               what);
}

// True if a living process accepts connections on the path.
bool InUse(const std::string& path) {
  const ScopedFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
  return ::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
}

Status PrepareSocketPath(const std::string& path) {
  if (path.size() >= sizeof(sockaddr_un::sun_path)) {
    return SocketError(path, "the path is too long for a unix socket",
                       "choose a listen.socket of fewer than 108 characters");
  }
  const std::string dir = path.substr(0, path.rfind('/'));
  if (!dir.empty() && ::mkdir(dir.c_str(), 0755) != 0 && errno != EEXIST) {
    return SocketError(path, fmt::format("cannot create {}: {}", dir, std::strerror(errno)),
                       "create the directory, or choose another listen.socket");
  }
  struct stat info {};
  if (::lstat(path.c_str(), &info) != 0) {
    if (::access(dir.empty() ? "/" : dir.c_str(), W_OK) == 0) return absl::OkStatus();
    return SocketError(path, std::strerror(errno),
                       "give the daemon write access to the directory, or choose another "
                       "listen.socket");
  }
  if (!S_ISSOCK(info.st_mode)) {
    return SocketError(path, "a file that is not a socket is there",
                       "remove it, or choose another listen.socket");
  }
  if (InUse(path)) {
    return SocketError(path, "another daemon is listening there",
                       "stop it, or choose another listen.socket");
  }
  if (::unlink(path.c_str()) != 0) {
    return SocketError(path, std::strerror(errno), "remove the stale socket file");
  }
  return absl::OkStatus();
}

Status CheckDevices(const Config& config) {
  for (const std::string& device : config.worker.devices) {
    WEIGHTD_RETURN_IF_ERROR(CheckServed(device));
  }
  return absl::OkStatus();
}

}  // namespace

class Server::Observer : public SyncObserver {
 public:
  explicit Observer(Metrics& metrics) : metrics_(metrics) {}

  void OnSyncEnd(const std::string& model, const SyncReport& report) override {
    uint64_t total = 0;
    for (const auto& [phase, micros] : report.phases) {
      metrics_.ObservePhase(Name(phase), static_cast<double>(micros) * 1e-6);
      total += micros;
    }
    metrics_.ObservePhase("total", static_cast<double>(total) * 1e-6);
    for (const auto& [path, bytes] : report.path_bytes) metrics_.AddTransferBytes(path, bytes);
    for (const ReplicaOutcome& replica : report.replicas) {
      if (FieldsOf(replica.error).reason == reason::kVerifyMismatch) metrics_.CountVerifyMismatch();
    }
    if (report.error.ok()) {
      const auto now = std::chrono::system_clock::now().time_since_epoch();
      metrics_.SetLastSuccess(model, std::chrono::duration<double>(now).count());
      return;
    }
    metrics_.CountFailure(FieldsOf(report.error).reason);
  }

  void OnReplica(const std::string& model, const std::string& engine, int dp_rank,
                 ReplicaState state, uint64_t version) override {
    metrics_.SetEngine({model, engine, static_cast<uint32_t>(dp_rank)}, Name(state), version);
  }

  void OnReplicaLeft(const std::string& model, const std::string& engine, int dp_rank) override {
    metrics_.RemoveEngine({model, engine, static_cast<uint32_t>(dp_rank)});
  }

  void OnWorkerRestart(const std::string& device) override { metrics_.CountWorkerRestart(device); }

  void OnStaging(const std::string& device, uint64_t bytes) override {
    metrics_.SetStagingBytes(device, bytes);
  }

  void OnPlanCompiled(double seconds) override { metrics_.ObservePlanCompile(seconds); }

 private:
  Metrics& metrics_;
};

Server::Server(Config config, std::shared_ptr<const LoaderRegistry> loaders,
               std::unique_ptr<VersionFile> versions)
    : config_(std::move(config)),
      metrics_(kVersion, "none"),
      versions_(std::move(versions)),
      observer_(std::make_unique<Observer>(metrics_)),
      coordinator_(std::make_unique<Coordinator>(
          Coordinator::Config{SyncOptionsOf(config_), versions_->epoch(),
                              config_.limits.max_tensors, config_.limits.max_sessions,
                              config_.worker.devices, WorkerSettingsOf(config_)},
          std::move(loaders), *versions_, *observer_)),
      supervisors_(MakeSupervisors()),
      actors_({*coordinator_, watcher_, config_.limits.max_message_bytes}),
      engines_({*coordinator_, watcher_, config_.limits.max_message_bytes}),
      workers_({*coordinator_, watcher_, config_.limits.max_message_bytes}, supervisors_),
      admin_(*coordinator_, supervisors_, workers_) {}

WorkerSupervisors Server::MakeSupervisors() {
  WorkerSupervisors supervisors;
  WorkerSupervisor::Callbacks callbacks;
  callbacks.on_exit = [this](const std::string& device, const std::string&) {
    metrics_.CountWorkerRestart(device);
  };
  for (const std::string& device : config_.worker.devices) {
    WorkerCommandLine command;
    command.daemon = "unix:" + config_.listen.socket;
    command.device = device;
    command.threads = config_.worker.threads;
    command.peer_check = config_.worker.peer_check;
    command.attach_deadline = config_.deadlines.registration;
    command.log_level = config_.runtime.log_level;
    command.log_format = config_.runtime.log_format;
    supervisors[device] = std::make_unique<WorkerSupervisor>(
        std::move(command), config_.RuntimeDir(), config_.worker.restart_backoff, callbacks);
  }
  return supervisors;
}

StatusOr<std::unique_ptr<Server>> Server::Create(const Config& config) {
  WEIGHTD_RETURN_IF_ERROR(CheckDevices(config));
  WEIGHTD_ASSIGN_OR_RETURN(auto loaders, LoaderRegistry::Create(config.runtime.loaders_dir));
  WEIGHTD_ASSIGN_OR_RETURN(auto versions, VersionFile::Open(config.runtime.state_dir));
  auto server =
      std::unique_ptr<Server>(new Server(config, std::move(loaders), std::move(versions)));
  WEIGHTD_RETURN_IF_ERROR(server->Listen());
  WEIGHTD_RETURN_IF_ERROR(server->StartHttp());
  for (const auto& [device, supervisor] : server->supervisors_) supervisor->Start();
  return server;
}

Status Server::Listen() {
  const std::string& path = config_.listen.socket;
  WEIGHTD_RETURN_IF_ERROR(PrepareSocketPath(path));
  grpc::EnableDefaultHealthCheckService(true);
  grpc::ServerBuilder builder;
  builder.SetMaxReceiveMessageSize(static_cast<int>(config_.limits.max_message_bytes));
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 10000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5000);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 2000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddListeningPort("unix:" + path, grpc::InsecureServerCredentials());
  if (!config_.listen.tcp.empty()) {
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.AddListeningPort(config_.listen.tcp, grpc::InsecureServerCredentials(), &tcp_port_);
  }
  builder.RegisterService(&actors_);
  builder.RegisterService(&engines_);
  builder.RegisterService(&workers_);
  builder.RegisterService(&admin_);
  grpc_ = builder.BuildAndStart();
  if (grpc_ == nullptr || (!config_.listen.tcp.empty() && tcp_port_ == 0)) {
    return SocketError(config_.listen.tcp.empty() ? path : path + " and " + config_.listen.tcp,
                       "the address is taken or not permitted",
                       "stop what listens there, or change listen.socket and listen.tcp");
  }
  owns_socket_ = true;
  return absl::OkStatus();
}

Status Server::StartHttp() {
  if (config_.listen.http.empty()) return absl::OkStatus();
  HttpCallbacks callbacks;
  callbacks.ready = [this] {
    if (admin_.draining()) return Readiness{false, "the daemon is draining"};
    const std::vector<std::string> missing = coordinator_->MissingWorkers();
    if (missing.empty()) return Readiness{true, ""};
    return Readiness{false, fmt::format("workers are not attached: {}", fmt::join(missing, ", "))};
  };
  callbacks.engine_ready = [this](const std::string& engine) -> std::optional<Readiness> {
    const std::optional<bool> ready = coordinator_->EngineReady(engine);
    if (!ready.has_value()) return std::nullopt;
    return Readiness{*ready, *ready ? "" : "the engine serves no version"};
  };
  callbacks.metrics = [this] {
    const std::vector<std::string> missing = coordinator_->MissingWorkers();
    for (const std::string& device : config_.worker.devices) {
      const bool up = std::find(missing.begin(), missing.end(), device) == missing.end();
      metrics_.SetWorkerUp(device, up);
    }
    std::map<std::string, bool> spawned;
    for (const auto& worker : coordinator_->SpawnedViews()) {
      spawned[worker.device] = worker.attached;
    }
    metrics_.SetSpawnedWorkers(spawned);
    return metrics_.Text();
  };
  WEIGHTD_ASSIGN_OR_RETURN(http_, HttpServer::Create(config_.listen.http, std::move(callbacks)));
  return absl::OkStatus();
}

void Server::Drain() {
  grpc_->GetHealthCheckService()->SetServingStatus(false);
  admin_.SetDraining();
  coordinator_->Drain(config_.deadlines.drain);
}

Server::~Server() {
  http_.reset();
  for (const auto& [device, supervisor] : supervisors_) supervisor->LetGo();
  if (grpc_ != nullptr) {
    grpc_->Shutdown(std::chrono::system_clock::now() + milliseconds(200));
    grpc_->Wait();
  }
  if (owns_socket_) ::unlink(config_.listen.socket.c_str());
}

Status CheckEnvironment(const Config& config) {
  WEIGHTD_RETURN_IF_ERROR(CheckDevices(config));
  WEIGHTD_RETURN_IF_ERROR(LoaderRegistry::Create(config.runtime.loaders_dir).status());
  return VersionFile::Open(config.runtime.state_dir).status();
}

}  // namespace weightd
