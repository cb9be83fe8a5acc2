#include "daemon/server/actor_stream.h"

#include "daemon/base/log.h"
#include "daemon/base/version.h"
#include "daemon/server/client_port.h"
#include "daemon/server/report_proto.h"
#include "daemon/wire/convert.h"

namespace weightd {
namespace {

class ActorStream;

class Port : public ClientPort<ActorPort, ActorStream, v1::ActorEvent> {
 public:
  using ClientPort::ClientPort;
  void SendProgress(uint64_t request, const SyncProgress& progress) override;
  void SendReport(uint64_t request, const SyncReport& report) override;
};

class ActorStream : public Stream<v1::ActorRequest, v1::ActorEvent> {
 public:
  ActorStream(ServerContext context, grpc::CallbackServerContext* call)
      : Stream(call), context_(context), port_(std::make_shared<Port>(this)) {
    DropPages();
    Start();
  }

 private:
  void OnMessage(v1::ActorRequest& request) override {
    Status status;
    if (session_ == nullptr && !request.has_hello()) {
      status = Error(StatusCode::kInvalidArgument, reason::kProtocol,
                     "use the client library of this release", "the first message must be hello");
    } else {
      status = Dispatch(request);
    }
    if (status.ok()) return;
    spdlog::info("actor refused: {}", Message(status));
    v1::ActorEvent event;
    *event.mutable_error()->mutable_detail() = ToProto(status);
    const bool fatal = session_ == nullptr;
    event.mutable_error()->set_fatal(fatal);
    Send(std::move(event));
    if (fatal) Close();
  }

  Status Dispatch(v1::ActorRequest& request) {
    switch (request.request_case()) {
      case v1::ActorRequest::kHello:
        return OnHello(request.hello());
      case v1::ActorRequest::kShards:
        return OnShards(request.shards());
      case v1::ActorRequest::kRegister:
        return OnRegister(request.register_());
      case v1::ActorRequest::kTable:
        return OnTable(request.table());
      case v1::ActorRequest::kSync:
        return OnSync(request.sync());
      case v1::ActorRequest::kCancel:
        context_.coordinator.CancelSync(*session_);
        return absl::OkStatus();
      case v1::ActorRequest::kWorkerEnded:
        context_.coordinator.WorkerEnded(port_.get(), request.worker_ended().device(),
                                         request.worker_ended().how(),
                                         request.worker_ended().given_up());
        return absl::OkStatus();
      case v1::ActorRequest::REQUEST_NOT_SET:
        break;
    }
    return Error(StatusCode::kInvalidArgument, reason::kProtocol,
                 "use the client library of this release", "empty or unknown request");
  }

  Status OnHello(const v1::ActorHello& hello) {
    if (session_ != nullptr) {
      return Error(StatusCode::kInvalidArgument, reason::kProtocol, "open a new stream",
                   "hello was sent twice");
    }
    WEIGHTD_RETURN_IF_ERROR(CheckProtocol(hello.protocol()));
    ActorIdentity identity;
    identity.model = hello.model();
    identity.group = hello.group();
    identity.group_order = hello.group_order();
    identity.rank = static_cast<int>(hello.rank());
    identity.world_size = static_cast<int>(hello.world_size());
    identity.process = Describe(hello.process());
    identity.spawns_worker = hello.spawns_worker();
    WEIGHTD_ASSIGN_OR_RETURN(session_, context_.coordinator.JoinActor(identity, port_));
    watch_ = context_.watcher.Watch(hello.process(), [port = port_] {
      port->handle().With([](ActorStream& stream) { stream.Abort(); });
    });
    v1::ActorEvent event;
    v1::ActorWelcome* welcome = event.mutable_welcome();
    *welcome->mutable_protocol() = OurProtocol();
    welcome->set_epoch(context_.coordinator.epoch());
    welcome->set_daemon_version(kVersion);
    welcome->set_max_message_bytes(context_.max_message_bytes);
    Send(std::move(event));
    return absl::OkStatus();
  }

  Status OnShards(const v1::ShardsPage& page) {
    if (refused_) return absl::OkStatus();
    Status status = AppendShards(page, shards_);
    if (status.ok()) status = context_.coordinator.CheckCount(shards_.first.size() - 1);
    refused_ = !status.ok();
    return status;
  }

  Status OnRegister(const v1::ActorRegister& request) {
    if (std::exchange(refused_, false)) {  // a page of it was: the client knows why
      DropPages();
      return absl::OkStatus();
    }
    digest_ = request.table_digest();
    num_tensors_ = request.num_tensors();
    device_ = request.device().empty() ? kHostDevice : request.device();
    table_.clear();
    if (!context_.coordinator.WantsTable(*session_, digest_)) return Finish(std::nullopt);
    awaits_table_ = true;
    v1::ActorEvent event;
    event.mutable_table_wanted();
    Send(std::move(event));
    return absl::OkStatus();
  }

  Status OnTable(const v1::TensorTablePage& page) {
    if (!awaits_table_) return absl::OkStatus();  // the rest of one that was refused
    Status status = AppendTable(page);
    if (!status.ok()) DropPages();
    return status;
  }

  Status AppendTable(const v1::TensorTablePage& page) {
    for (const v1::TensorSpec& spec : page.tensors()) {
      WEIGHTD_ASSIGN_OR_RETURN(TensorInfo tensor, FromProto(spec));
      table_.push_back(std::move(tensor));
    }
    WEIGHTD_RETURN_IF_ERROR(context_.coordinator.CheckCount(table_.size()));
    if (!page.last()) return absl::OkStatus();
    if (table_.size() != num_tensors_) {
      return Error(StatusCode::kInvalidArgument, reason::kProtocol,
                   "use the client library of this release",
                   "table has {} tensors, {} were announced", table_.size(), num_tensors_);
    }
    return Finish(std::move(table_));
  }

  Status Finish(std::optional<TensorTable> table) {
    RankShards shards = std::move(shards_);
    DropPages();
    WEIGHTD_ASSIGN_OR_RETURN(const WorkerEndpoint endpoint,
                             context_.coordinator.RegisterActor(
                                 *session_, device_, digest_, std::move(table), std::move(shards)));
    v1::ActorEvent event;
    *event.mutable_registered()->mutable_worker() = ToProto(endpoint);
    Send(std::move(event));
    return absl::OkStatus();
  }

  Status OnSync(const v1::ActorSync& sync) {
    SyncRequest request;
    request.version = sync.version();
    request.request = sync.request();
    request.require_replicas = sync.require_replicas();
    request.check_replicas = sync.check_replicas();
    request.refused = FromProto(sync.refused());
    if (session_->member == MemberId::kNone) {
      return Error(StatusCode::kFailedPrecondition, reason::kProtocol,
                   "call register() before sync()", "nothing is registered");
    }
    context_.coordinator.RequestSync(*session_, std::move(request));
    return absl::OkStatus();
  }

  void DropPages() {
    shards_ = RankShards();
    shards_.first.push_back(0);
    table_.clear();
    awaits_table_ = false;
  }

  void OnClosed() override {
    context_.watcher.Unwatch(watch_);
    port_->handle().Detach();
    if (session_ != nullptr) {
      context_.coordinator.LeaveActor(*session_, Error(StatusCode::kUnavailable, reason::kPeerLost,
                                                       "", "its connection ended"));
    }
  }

  ServerContext context_;
  std::shared_ptr<Port> port_;
  std::shared_ptr<ActorSession> session_;
  uint64_t watch_ = 0;
  std::string device_;
  std::string digest_;
  uint32_t num_tensors_ = 0;
  bool awaits_table_ = false;
  bool refused_ = false;  // a page of shards was: what follows of this registration is skipped
  RankShards shards_;
  TensorTable table_;
};

void Port::SendProgress(uint64_t request, const SyncProgress& progress) {
  v1::ActorEvent event;
  v1::SyncProgress* proto = event.mutable_progress();
  *proto = ToProto(progress);
  proto->set_request(request);
  Send(std::move(event));
}

void Port::SendReport(uint64_t request, const SyncReport& report) {
  v1::ActorEvent event;
  *event.mutable_result() = ToProto(report);
  event.mutable_result()->set_request(request);
  Send(std::move(event));
}

}  // namespace

grpc::ServerBidiReactor<v1::ActorRequest, v1::ActorEvent>* ActorService::Session(
    grpc::CallbackServerContext* call) {
  return new ActorStream(context_, call);
}

}  // namespace weightd
