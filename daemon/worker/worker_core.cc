#include "daemon/worker/worker_core.h"

#include <algorithm>
#include <utility>

#include "daemon/base/log.h"
#include "daemon/wire/convert.h"

namespace weightd {
namespace {

/// Is it a step of this attempt?
bool IsOf(const Job& job, const v1::AttemptId& attempt) {
  const v1::AttemptId& of_job = job.command.run().attempt();
  return job.command.has_run() && of_job.epoch() == attempt.epoch() &&
         of_job.counter() == attempt.counter();
}

}  // namespace

StatusOr<std::unique_ptr<WorkerCore>> WorkerCore::Create(const Options& options,
                                                         Transports transports, ReportFn report) {
  WEIGHTD_ASSIGN_OR_RETURN(std::unique_ptr<MemberTable> members,
                           MemberTable::Create(options.members, report));
  return std::unique_ptr<WorkerCore>(
      new WorkerCore(options, std::move(members), std::move(transports), std::move(report)));
}

WorkerCore::WorkerCore(const Options& options, std::unique_ptr<MemberTable> members,
                       Transports transports, ReportFn report)
    : report_(std::move(report)),
      on_broken_(options.on_broken),
      device_(options.device),
      members_(std::move(members)),
      transports_(std::move(transports)),
      runner_(members_.get(), &plans_,
              {transports_.direct.get(), transports_.verifier.get(), transports_.wires.get()},
              options.num_threads, report_),
      jobs_([this](Job& job) { RunJob(job); }),
      verifications_([this](Job& job) {
        RunStep(job);
        EndIf(transports_.verifier->broken());
      }) {}

WorkerCore::~WorkerCore() = default;

void WorkerCore::Handle(v1::WorkerCommand command) {
  switch (command.command_case()) {
    case v1::WorkerCommand::kExpect:
      return members_->Expect(command.expect());
    case v1::WorkerCommand::kForget:
      return members_->Forget(command.forget().member());
    case v1::WorkerCommand::kCancel:
      return Cancel(command.cancel().attempt());
    case v1::WorkerCommand::kLanded:
      return RaiseLanded(command.landed());
    case v1::WorkerCommand::kMakeWireId:
      return MakeWireId(command.make_wire_id().wire());
    case v1::WorkerCommand::kCloseWire:
      CancelOpening(command.close_wire().wire());
      break;
    default:
      break;
  }
  const bool verifies = command.has_run() && command.run().step() == v1::STEP_VERIFY;
  (verifies ? verifications_ : jobs_).Push(std::move(command));
}

void WorkerCore::Cancel(const v1::AttemptId& attempt) {
  for (JobQueue* queue : {&jobs_, &verifications_}) {
    queue->ForEach([&](Job& job) {
      if (IsOf(job, attempt)) job.cancelled.store(true);
    });
  }
}

void WorkerCore::CancelOpening(uint64_t wire) {
  jobs_.ForEach([&](Job& job) {
    const bool opens = job.command.has_open_wire() && job.command.open_wire().wire() == wire;
    if (opens) job.cancelled.store(true);
  });
}

void WorkerCore::RaiseLanded(const v1::Landed& landed) {
  verifications_.ForEach([&](Job& job) {
    const auto target = job.landed.find(landed.target());
    const bool follows = IsOf(job, landed.attempt()) &&
                         job.command.run().round() == landed.round() && target != job.landed.end();
    if (follows) target->second.store(landed.writes(), std::memory_order_release);
  });
}

void WorkerCore::RunStep(Job& job) {
  v1::WorkerReport report;
  *report.mutable_done() = runner_.Run(job.command.run(), &job.cancelled,
                                       job.command.run().follows() ? &job.landed : nullptr);
  report_(std::move(report));
}

void WorkerCore::RunJob(Job& job) {
  const v1::WorkerCommand& command = job.command;
  switch (command.command_case()) {
    case v1::WorkerCommand::kPlan:
      return AddPlanPage(command.plan());
    case v1::WorkerCommand::kRun:
      RunStep(job);
      return EndIfBroken();
    case v1::WorkerCommand::kOpenWire:
      OpenWire(job);
      return EndIfBroken();
    case v1::WorkerCommand::kCloseWire:
      return CloseWire(command.close_wire().wire());
    case v1::WorkerCommand::kDropPlan:
      if (transports_.wires != nullptr) transports_.wires->Close(command.drop_plan().plan());
      assemblies_.erase(command.drop_plan().plan());
      return plans_.Drop(command.drop_plan().plan());
    case v1::WorkerCommand::kDropRetained:
      return runner_.DropRetained(command.drop_retained().version());
    default:
      spdlog::warn("command of the daemon is unknown: case={}",
                   static_cast<int>(command.command_case()));
  }
}

void WorkerCore::EndIfBroken() {
  EndIf(transports_.direct->broken() ||
        (transports_.wires != nullptr && transports_.wires->broken()));
}

void WorkerCore::EndIf(bool broken) const {
  if (broken && on_broken_) on_broken_();
}

namespace {

Status NoWires(const std::string& device) {
  return Error(StatusCode::kUnimplemented, reason::kNoPath,
               "install NCCL on this machine, or use devices whose memory can be mapped",
               "worker cannot take part in a wire: device={}", device);
}

}  // namespace

void WorkerCore::MakeWireId(uint64_t wire) {
  v1::WorkerReport report;
  v1::WireId& made = *report.mutable_wire_id();
  made.set_wire(wire);
  const StatusOr<std::string> id =
      transports_.wires == nullptr ? NoWires(device_) : transports_.wires->MakeId();
  if (id.ok()) {
    made.set_id(*id);
  } else {
    *made.mutable_error() = ToProto(WithPhase(id.status(), "build_plan"));
  }
  report_(std::move(report));
}

void WorkerCore::OpenWire(Job& job) {
  const v1::OpenWire& command = job.command.open_wire();
  WireTransport* const wires = transports_.wires.get();
  const auto open = [&]() -> Status {
    if (wires == nullptr) return NoWires(device_);
    WEIGHTD_ASSIGN_OR_RETURN(const std::shared_ptr<const LoadedPlan> plan,
                             plans_.Get(command.plan()));
    WireTransport::Offer offer{.wire = command.wire(), .plan = command.plan(), .id = command.id()};
    if (command.deadline_us() != 0) {
      offer.deadline = Clock::now() + microseconds(command.deadline_us());
    }
    static const WireSchedule none;  // slots and links are those of any round
    return wires->Open(offer, plan->wires.empty() ? none : plan->wires.front(), job.cancelled);
  };
  const Status opened = open();
  v1::WorkerReport report;
  v1::WireReady& ready = *report.mutable_wire_ready();
  ready.set_wire(command.wire());
  if (opened.ok()) {
    std::erase_if(plan_of_wire_, [&](const auto& old) { return old.second == command.plan(); });
    plan_of_wire_[command.wire()] = command.plan();
  } else {
    *ready.mutable_error() = ToProto(WithPhase(opened, "build_plan"));
  }
  if (wires != nullptr) ready.set_staging_bytes(wires->staging_bytes());
  report_(std::move(report));
}

void WorkerCore::CloseWire(uint64_t wire) {
  const auto known = plan_of_wire_.find(wire);
  if (known == plan_of_wire_.end()) return;
  transports_.wires->Close(known->second);
  plan_of_wire_.erase(known);
}

void WorkerCore::AddPlanPage(const v1::PlanPage& page) {
  Assembly& assembly = assemblies_[page.plan()];
  if (assembly.error.ok()) assembly.error = assembly.assembler.Add(page);
  if (!page.last()) return;
  const auto load = [this, &assembly]() -> StatusOr<std::shared_ptr<const LoadedPlan>> {
    WEIGHTD_RETURN_IF_ERROR(assembly.error);
    WEIGHTD_ASSIGN_OR_RETURN(PlanInput input, assembly.assembler.Finish());
    return LoadPlan(std::move(input), device_);
  };
  StatusOr<std::shared_ptr<const LoadedPlan>> plan = load();
  assemblies_.erase(page.plan());

  v1::WorkerReport report;
  v1::PlanLoaded& loaded = *report.mutable_plan_loaded();
  loaded.set_plan(page.plan());
  if (plan.ok()) {
    loaded.set_digest((*plan)->digest.data(), (*plan)->digest.size());
    loaded.set_bytes((*plan)->bytes);
    loaded.set_windows((*plan)->windows);
    plans_.Put(page.plan(), *std::move(plan));
  } else {
    *loaded.mutable_error() = ToProto(WithPhase(plan.status(), "build_plan"));
  }
  report_(std::move(report));
}

}  // namespace weightd
