#include "daemon/server/worker_stream.h"

#include <algorithm>

#include "daemon/base/log.h"
#include "daemon/base/version.h"
#include "daemon/server/plan_pages.h"
#include "daemon/server/report_proto.h"
#include "daemon/wire/convert.h"

namespace weightd {

/// Workers of this protocol and later can verify beside a transfer.
constexpr uint32_t kMinorThatFollows = 3;

class WorkerPortImpl : public WorkerPort {
 public:
  /// `kill` ends the process with SIGKILL, by way of whoever started it.
  WorkerPortImpl(class WorkerStream* stream, std::function<void(const std::string& why)> kill,
                 const v1::WorkerHello& hello)
      : handle_(stream),
        kill_(std::move(kill)),
        device_(hello.device()),
        socket_path_(hello.socket_path()),
        facts_{hello.nccl_version(),
               hello.nccl_problem(),
               {hello.peers().begin(), hello.peers().end()},
               hello.protocol().minor() >= kMinorThatFollows} {}

  std::string device() const override { return device_; }
  std::string socket_path() const override { return socket_path_; }
  WorkerFacts facts() const override { return facts_; }
  void SendExpect(MemberId member, const std::string& token, bool writable,
                  const std::string& label) override;
  void SendForget(MemberId member) override;
  void SendPlan(const WorkerPlan& plan) override;
  void SendDropPlan(uint64_t handle) override;
  void SendStep(const StepCommand& command) override;
  void SendCancel(AttemptId attempt) override;
  void SendLanded(const LandedMark& mark) override;
  void SendMakeWireId(uint64_t wire) override;
  void SendOpenWire(const WireOffer& offer) override;
  void SendCloseWire(uint64_t wire) override;
  void Kill(const std::string& why) override {
    spdlog::error("worker is killed: {} device={}", why, device_);
    kill_(why);
  }
  void Send(v1::WorkerCommand command);
  StreamHandle<WorkerStream>& handle() { return handle_; }

 private:
  StreamHandle<WorkerStream> handle_;
  const std::function<void(const std::string& why)> kill_;
  const std::string device_;
  const std::string socket_path_;
  const WorkerFacts facts_;
};

class WorkerStream : public Stream<v1::WorkerReport, v1::WorkerCommand> {
 public:
  WorkerStream(WorkerService& service, grpc::CallbackServerContext* call)
      : Stream(call), service_(service) {
    Start();
  }

 private:
  Coordinator& coordinator() { return service_.context_.coordinator; }
  /// \pre hello was accepted
  std::string device() const { return port_->device(); }

  void OnMessage(v1::WorkerReport& report) override {
    if (port_ == nullptr && !report.has_hello()) {
      Close(grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "the first message must be hello"));
      return;
    }
    switch (report.report_case()) {
      case v1::WorkerReport::kHello:
        return OnHello(report.hello());
      case v1::WorkerReport::kAttached: {
        const Status status = FromProto(report.attached().error());
        if (status.ok()) {
          const std::lock_guard lock(service_.mu_);
          service_.mapped_[device()][report.attached().member()] = report.attached().mapped_bytes();
        }
        return coordinator().MemberAttached(
            device(), static_cast<MemberId>(report.attached().member()), status);
      }
      case v1::WorkerReport::kLost: {
        {
          const std::lock_guard lock(service_.mu_);
          service_.mapped_[device()].erase(report.lost().member());
        }
        return coordinator().MemberLost(device(), static_cast<MemberId>(report.lost().member()),
                                        report.lost().cause());
      }
      case v1::WorkerReport::kPlanLoaded:
        return OnPlanLoaded(report.plan_loaded());
      case v1::WorkerReport::kProgress: {
        Event event;
        event.kind = Event::Kind::kProgress;
        event.device = device();
        event.attempt = FromProto(report.progress().attempt());
        event.step = static_cast<Step>(report.progress().step());
        event.bytes = report.progress().bytes_done();
        return coordinator().WorkerEvent(event);
      }
      case v1::WorkerReport::kLanded: {
        const v1::Landed& landed = report.landed();
        return coordinator().WorkerEvent({.kind = Event::Kind::kLanded,
                                          .device = device(),
                                          .attempt = FromProto(landed.attempt()),
                                          .round = landed.round(),
                                          .target = landed.target(),
                                          .writes = landed.writes()});
      }
      case v1::WorkerReport::kDone:
        return OnDone(report.done());
      case v1::WorkerReport::kWireId: {
        Event event;
        event.kind = Event::Kind::kWireId;
        event.device = device();
        event.wire = report.wire_id().wire();
        event.wire_id = report.wire_id().id();
        event.status = FromProto(report.wire_id().error());
        return coordinator().WorkerEvent(event);
      }
      case v1::WorkerReport::kWireReady: {
        Event event;
        event.kind = Event::Kind::kWireReady;
        event.device = device();
        event.wire = report.wire_ready().wire();
        event.status = FromProto(report.wire_ready().error());
        coordinator().StagingUsed(device(), report.wire_ready().staging_bytes());
        return coordinator().WorkerEvent(event);
      }
      case v1::WorkerReport::REPORT_NOT_SET:
        return;
    }
  }

  void OnHello(const v1::WorkerHello& hello) {
    auto kill = KillerOf(hello);
    if (port_ != nullptr || !CheckProtocol(hello.protocol()).ok() || kill == nullptr) {
      spdlog::warn("a process that is not this daemon's worker tried to attach: pid={} device={}",
                   hello.pid(), hello.device());
      Close(grpc::Status(grpc::StatusCode::UNAUTHENTICATED, "not a worker of this daemon"));
      return;
    }
    port_ = std::make_shared<WorkerPortImpl>(this, std::move(kill), hello);
    coordinator().WorkerUp(port_, hello.pid());
  }

  // How to kill the worker that says this; empty if its token is not that of a worker of the
  // device, started by the daemon or by the client that was asked to.
  std::function<void(const std::string& why)> KillerOf(const v1::WorkerHello& hello) {
    const auto it = service_.supervisors_.find(hello.device());
    if (it != service_.supervisors_.end()) {
      WorkerSupervisor* const supervisor = it->second.get();
      if (hello.token() != supervisor->token()) return nullptr;
      return [supervisor](const std::string&) { supervisor->Kill(); };
    }
    auto owner = coordinator().WorkerOwner(hello.device(), hello.token());
    if (owner == nullptr) return nullptr;
    return [owner = std::move(owner), device = hello.device()](const std::string& why) {
      owner->SendStopWorker(device, true, why);
    };
  }

  void OnPlanLoaded(const v1::PlanLoaded& loaded) {
    Event event;
    event.kind = Event::Kind::kPlanLoaded;
    event.device = device();
    event.plan = loaded.plan();
    event.status = FromProto(loaded.error());
    if (loaded.digest().size() == event.digest.size()) {
      std::copy(loaded.digest().begin(), loaded.digest().end(), event.digest.begin());
    }
    coordinator().WorkerEvent(event);
  }

  void OnDone(const v1::StepDone& done) {
    Event event;
    event.kind = Event::Kind::kStepDone;
    event.device = device();
    event.attempt = FromProto(done.attempt());
    event.step = static_cast<Step>(done.step());
    event.status = FromProto(done.error());
    event.bytes = done.bytes();
    event.touched = done.touched();
    event.shard_words.assign(done.shard_words().begin(), done.shard_words().end());
    for (const v1::TargetDigests& digests : done.digests()) {
      TargetDigests target;
      target.target = digests.target();
      target.tensors.assign(digests.tensors().begin(), digests.tensors().end());
      target.words.assign(digests.words().begin(), digests.words().end());
      event.digests.push_back(std::move(target));
    }
    coordinator().StagingUsed(port_->device(), done.staging_bytes());
    coordinator().WorkerEvent(event);
  }

  void OnClosed() override {
    if (port_ == nullptr) return;
    port_->handle().Detach();
    {
      const std::lock_guard lock(service_.mu_);
      service_.mapped_.erase(port_->device());
    }
    const std::string peer = "worker " + port_->device();
    coordinator().WorkerDown(
        port_.get(),
        WithPeer(Error(StatusCode::kUnavailable, reason::kWorkerLost,
                       "it is being restarted and clients attach again by themselves: sync again",
                       "the worker died: device={}", port_->device()),
                 peer));
  }

  WorkerService& service_;
  std::shared_ptr<WorkerPortImpl> port_;
};

void WorkerPortImpl::Send(v1::WorkerCommand command) {
  handle_.With([&](WorkerStream& stream) { stream.Send(std::move(command)); });
}

void WorkerPortImpl::SendExpect(MemberId member, const std::string& token, bool writable,
                                const std::string& label) {
  v1::WorkerCommand command;
  v1::ExpectMember* expect = command.mutable_expect();
  expect->set_member(Value(member));
  expect->set_token(token);
  expect->set_writable(writable);
  expect->set_label(label);
  Send(std::move(command));
}

void WorkerPortImpl::SendForget(MemberId member) {
  v1::WorkerCommand command;
  command.mutable_forget()->set_member(Value(member));
  Send(std::move(command));
}

void WorkerPortImpl::SendPlan(const WorkerPlan& plan) {
  for (v1::PlanPage& page : PlanPages(plan)) {
    v1::WorkerCommand command;
    command.mutable_plan()->Swap(&page);
    Send(std::move(command));
  }
}

void WorkerPortImpl::SendDropPlan(uint64_t handle) {
  v1::WorkerCommand command;
  command.mutable_drop_plan()->set_plan(handle);
  Send(std::move(command));
}

void WorkerPortImpl::SendStep(const StepCommand& step) {
  v1::WorkerCommand command;
  v1::RunStep* run = command.mutable_run();
  *run->mutable_attempt() = ToProto(step.attempt);
  run->set_step(static_cast<v1::Step>(step.step));
  run->set_plan(step.plan);
  run->mutable_targets()->Add(step.targets.begin(), step.targets.end());
  for (MemberId peer : step.peers) run->add_peers(Value(peer));
  run->set_version(step.version);
  run->set_round(step.round);
  run->set_deadline_us(
      static_cast<uint64_t>(std::chrono::duration_cast<microseconds>(step.deadline).count()));
  run->set_wire(step.wire);
  run->set_follows(step.follows);
  run->set_turn_deadline_us(
      static_cast<uint64_t>(std::chrono::duration_cast<microseconds>(step.turn_deadline).count()));
  Send(std::move(command));
}

void WorkerPortImpl::SendMakeWireId(uint64_t wire) {
  v1::WorkerCommand command;
  command.mutable_make_wire_id()->set_wire(wire);
  Send(std::move(command));
}

void WorkerPortImpl::SendOpenWire(const WireOffer& offer) {
  v1::WorkerCommand command;
  v1::OpenWire* open = command.mutable_open_wire();
  open->set_wire(offer.wire);
  open->set_plan(offer.plan);
  open->set_id(offer.id);
  open->set_deadline_us(
      static_cast<uint64_t>(std::chrono::duration_cast<microseconds>(offer.deadline).count()));
  Send(std::move(command));
}

void WorkerPortImpl::SendCloseWire(uint64_t wire) {
  v1::WorkerCommand command;
  command.mutable_close_wire()->set_wire(wire);
  Send(std::move(command));
}

void WorkerPortImpl::SendCancel(AttemptId attempt) {
  v1::WorkerCommand command;
  *command.mutable_cancel()->mutable_attempt() = ToProto(attempt);
  Send(std::move(command));
}

void WorkerPortImpl::SendLanded(const LandedMark& mark) {
  v1::WorkerCommand command;
  v1::Landed& landed = *command.mutable_landed();
  *landed.mutable_attempt() = ToProto(mark.attempt);
  landed.set_round(mark.round);
  landed.set_target(mark.target);
  landed.set_writes(mark.writes);
  Send(std::move(command));
}

grpc::ServerBidiReactor<v1::WorkerReport, v1::WorkerCommand>* WorkerService::Attach(
    grpc::CallbackServerContext* call) {
  return new WorkerStream(*this, call);
}

std::pair<uint64_t, uint32_t> WorkerService::Mapped(const std::string& device) {
  const std::lock_guard lock(mu_);
  const auto it = mapped_.find(device);
  if (it == mapped_.end()) return {0, 0};
  uint64_t bytes = 0;
  for (const auto& [member, size] : it->second) bytes += size;
  return {bytes, static_cast<uint32_t>(it->second.size())};
}

}  // namespace weightd
