#include "daemon/server/engine_stream.h"

#include "daemon/base/log.h"
#include "daemon/base/version.h"
#include "daemon/server/client_port.h"
#include "daemon/server/report_proto.h"
#include "daemon/wire/convert.h"

namespace weightd {
namespace {

// Most blocks of one rank's trace; more than any layout needs that is not scattered.
constexpr size_t kMaxTracedWrites = size_t{1} << 22;

class EngineStream;

class Port : public ClientPort<EnginePort, EngineStream, v1::EngineEvent> {
 public:
  using ClientPort::ClientPort;
  void SendPrepare(AttemptId attempt, uint64_t version, bool catch_up) override;
  void SendConvert(AttemptId attempt, uint32_t stage) override;
  void SendCommit(AttemptId attempt, uint64_t version) override;
  void SendOutcome(AttemptId attempt, const ReplicaOutcome& outcome, bool untouched) override;
  void SendIdle(uint64_t version, const Status& why) override;
};

class EngineStream : public Stream<v1::EngineRequest, v1::EngineEvent> {
 public:
  EngineStream(ServerContext context, grpc::CallbackServerContext* call)
      : Stream(call), context_(context), port_(std::make_shared<Port>(this)) {
    Start();
  }

 private:
  void OnMessage(v1::EngineRequest& request) override {
    Status status;
    if (session_ == nullptr && !request.has_hello()) {
      status = Error(StatusCode::kInvalidArgument, reason::kProtocol,
                     "use the client library of this release", "the first message must be hello");
    } else {
      status = Dispatch(request);
    }
    if (status.ok()) return;
    spdlog::info("engine refused: {}", Message(status));
    v1::EngineEvent event;
    *event.mutable_error()->mutable_detail() = ToProto(status);
    const bool fatal = session_ == nullptr;
    event.mutable_error()->set_fatal(fatal);
    Send(std::move(event));
    if (fatal) Close();
  }

  Status Dispatch(v1::EngineRequest& request) {
    switch (request.request_case()) {
      case v1::EngineRequest::kHello:
        return OnHello(request.hello());
      case v1::EngineRequest::kParams:
        return OnParams(request.params());
      case v1::EngineRequest::kTrace:
        return OnTrace(request.trace());
      case v1::EngineRequest::kRegister:
        return OnRegister(request.register_());
      case v1::EngineRequest::kQuiesced:
        context_.coordinator.Quiesced(*session_, FromProto(request.quiesced().attempt()),
                                      FromProto(request.quiesced().error()));
        return absl::OkStatus();
      case v1::EngineRequest::kConverted:
        context_.coordinator.Converted(*session_, FromProto(request.converted().attempt()),
                                       request.converted().stage(),
                                       FromProto(request.converted().error()));
        return absl::OkStatus();
      case v1::EngineRequest::kCommitted: {
        const v1::EngineCommitted& committed = request.committed();
        context_.coordinator.Committed(
            *session_, FromProto(committed.attempt()), FromProto(committed.error()),
            {committed.caches_reset().begin(), committed.caches_reset().end()});
        return absl::OkStatus();
      }
      case v1::EngineRequest::kReleased:
        orderly_ = true;
        Close();
        return absl::OkStatus();
      case v1::EngineRequest::kWorkerEnded:
        context_.coordinator.WorkerEnded(port_.get(), request.worker_ended().device(),
                                         request.worker_ended().how(),
                                         request.worker_ended().given_up());
        return absl::OkStatus();
      case v1::EngineRequest::REQUEST_NOT_SET:
        break;
    }
    return Error(StatusCode::kInvalidArgument, reason::kProtocol,
                 "use the client library of this release", "empty or unknown request");
  }

  Status OnHello(const v1::EngineHello& hello) {
    if (session_ != nullptr) {
      return Error(StatusCode::kInvalidArgument, reason::kProtocol, "open a new stream",
                   "hello was sent twice");
    }
    WEIGHTD_RETURN_IF_ERROR(CheckProtocol(hello.protocol()));
    EngineIdentity identity;
    identity.model = hello.model();
    identity.engine = hello.engine();
    WEIGHTD_ASSIGN_OR_RETURN(identity.coordinates, FromProto(hello.coordinates()));
    identity.num_ranks = static_cast<int>(std::max<uint32_t>(hello.num_ranks(), 1));
    identity.process = Describe(hello.process());
    identity.held_version = hello.held_version();
    identity.dirty = hello.dirty();
    num_ranks_ = identity.num_ranks;
    identity.spawns_worker = hello.spawns_worker();
    WEIGHTD_ASSIGN_OR_RETURN(session_, context_.coordinator.JoinEngine(identity, port_));
    watch_ = context_.watcher.Watch(hello.process(), [port = port_] {
      port->handle().With([](EngineStream& stream) { stream.Abort(); });
    });
    v1::EngineEvent event;
    v1::EngineWelcome* welcome = event.mutable_welcome();
    *welcome->mutable_protocol() = OurProtocol();
    welcome->set_epoch(context_.coordinator.epoch());
    welcome->set_daemon_version(kVersion);
    welcome->set_max_message_bytes(context_.max_message_bytes);
    Send(std::move(event));
    return absl::OkStatus();
  }

  Status OnParams(const v1::ParamsPage& page) {
    if (refused_) return absl::OkStatus();
    Status status = AppendParams(page);
    refused_ = !status.ok();
    return status;
  }

  Status AppendParams(const v1::ParamsPage& page) {
    for (const v1::ParamSpec& spec : page.params()) {
      WEIGHTD_ASSIGN_OR_RETURN(ParamInfo param, FromProto(spec));
      params_.push_back(std::move(param));
    }
    return context_.coordinator.CheckCount(params_.size());
  }

  Status OnTrace(const v1::TracePage& page) {
    for (const v1::TracedSource& source : page.sources()) {
      StatusOr<Dims> shape = DimsFromProto(source.shape());
      if (!shape.ok()) return WithTensor(shape.status(), source.name());
      traced_sources_.push_back({.name = source.name(), .shape = *shape});
    }
    for (const v1::WriteSpec& spec : page.writes()) {
      WEIGHTD_ASSIGN_OR_RETURN(Write write, FromProto(spec));
      traced_writes_.push_back(write);
    }
    if (traced_writes_.size() > kMaxTracedWrites) {
      traced_writes_.clear();
      return Error(StatusCode::kResourceExhausted, reason::kMessageTooLarge,
                   "write a rule file for this model", "a trace has more than {} writes",
                   kMaxTracedWrites);
    }
    return absl::OkStatus();
  }

  // The trace that came before the registration; nullptr if none did.
  StatusOr<std::shared_ptr<const TracedLayout>> TakeTrace(const v1::EngineRegister& request,
                                                          size_t num_params) {
    std::vector<TracedSource> sources;
    std::vector<Write> writes;
    std::swap(sources, traced_sources_);
    std::swap(writes, traced_writes_);
    if (sources.size() != request.num_traced_sources() ||
        writes.size() != request.num_traced_writes()) {
      return Error(
          StatusCode::kInvalidArgument, reason::kProtocol, "use the client library of this release",
          "{} traced sources and {} writes were sent, {} and {} were announced", sources.size(),
          writes.size(), request.num_traced_sources(), request.num_traced_writes());
    }
    if (sources.empty()) return std::shared_ptr<const TracedLayout>();
    return TracedLayout::Create(std::move(sources), std::move(writes), num_params);
  }

  Status OnRegister(const v1::EngineRegister& request) {
    std::vector<ParamInfo> params;
    std::swap(params, params_);
    if (std::exchange(refused_, false)) return absl::OkStatus();  // a page was: the client knows
    WEIGHTD_ASSIGN_OR_RETURN(std::shared_ptr<const TracedLayout> trace,
                             TakeTrace(request, params.size()));
    if (params.size() != request.num_params()) {
      return Error(
          StatusCode::kInvalidArgument, reason::kProtocol, "use the client library of this release",
          "{} parameters were sent, {} were announced", params.size(), request.num_params());
    }
    EngineModel model;
    model.architecture = request.architecture();
    model.profile = request.profile();
    model.config_json = request.config_json();
    model.commit_mode = request.commit_mode();
    model.num_ranks = num_ranks_;
    const std::string device = request.device().empty() ? kHostDevice : request.device();
    WEIGHTD_ASSIGN_OR_RETURN(
        const std::vector<WorkerEndpoint> endpoints,
        context_.coordinator.RegisterEngine(*session_, device, std::move(model), std::move(params),
                                            std::move(trace), request.prefer_trace()));
    v1::EngineEvent event;
    v1::EngineRegistered& registered = *event.mutable_registered();
    *registered.mutable_worker() = ToProto(endpoints.front());
    for (size_t i = 1; i < endpoints.size(); ++i) {
      *registered.add_writers() = ToProto(endpoints[i]);
    }
    Send(std::move(event));
    return absl::OkStatus();
  }

  void OnClosed() override {
    context_.watcher.Unwatch(watch_);
    port_->handle().Detach();
    if (session_ == nullptr) return;
    context_.coordinator.LeaveEngine(
        *session_,
        orderly_ ? absl::OkStatus()
                 : Error(StatusCode::kUnavailable, reason::kPeerLost, "", "its connection ended"));
  }

  ServerContext context_;
  std::shared_ptr<Port> port_;
  std::shared_ptr<EngineSession> session_;
  uint64_t watch_ = 0;
  int num_ranks_ = 1;
  bool orderly_ = false;
  bool refused_ = false;  // a page of parameters was: the rest of this registration is skipped
  // Pages of the next registration.
  std::vector<ParamInfo> params_;
  std::vector<TracedSource> traced_sources_;
  std::vector<Write> traced_writes_;
};

void Port::SendPrepare(AttemptId attempt, uint64_t version, bool catch_up) {
  v1::EngineEvent event;
  *event.mutable_prepare()->mutable_attempt() = ToProto(attempt);
  event.mutable_prepare()->set_version(version);
  event.mutable_prepare()->set_catch_up(catch_up);
  Send(std::move(event));
}

void Port::SendConvert(AttemptId attempt, uint32_t stage) {
  v1::EngineEvent event;
  *event.mutable_convert()->mutable_attempt() = ToProto(attempt);
  event.mutable_convert()->set_stage(stage);
  Send(std::move(event));
}

void Port::SendCommit(AttemptId attempt, uint64_t version) {
  v1::EngineEvent event;
  *event.mutable_commit()->mutable_attempt() = ToProto(attempt);
  event.mutable_commit()->set_version(version);
  Send(std::move(event));
}

void Port::SendOutcome(AttemptId attempt, const ReplicaOutcome& outcome, bool untouched) {
  v1::EngineEvent event;
  v1::EngineOutcome* proto = event.mutable_outcome();
  *proto->mutable_attempt() = ToProto(attempt);
  proto->set_committed(outcome.committed);
  proto->set_version(outcome.version);
  proto->set_state(static_cast<v1::EngineState>(outcome.state));
  if (!outcome.error.ok()) *proto->mutable_error() = ToProto(outcome.error);
  proto->set_untouched(untouched);
  Send(std::move(event));
}

void Port::SendIdle(uint64_t version, const Status& why) {
  v1::EngineEvent event;
  event.mutable_idle()->set_version(version);
  if (!why.ok()) *event.mutable_idle()->mutable_error() = ToProto(why);
  Send(std::move(event));
}

}  // namespace

grpc::ServerBidiReactor<v1::EngineRequest, v1::EngineEvent>* EngineService::Session(
    grpc::CallbackServerContext* call) {
  return new EngineStream(context_, call);
}

}  // namespace weightd
