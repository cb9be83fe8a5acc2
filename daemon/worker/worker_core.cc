#include "daemon/worker/worker_core.h"

#include <algorithm>
#include <utility>

#include "daemon/base/log.h"
#include "daemon/wire/convert.h"

namespace weightd {

StatusOr<std::unique_ptr<WorkerCore>> WorkerCore::Create(const Options& options,
                                                         std::unique_ptr<Transport> transport,
                                                         ReportFn report) {
  WEIGHTD_ASSIGN_OR_RETURN(std::unique_ptr<MemberTable> members,
                           MemberTable::Create(options.members, report));
  return std::unique_ptr<WorkerCore>(
      new WorkerCore(options, std::move(members), std::move(transport), std::move(report)));
}

WorkerCore::WorkerCore(const Options& options, std::unique_ptr<MemberTable> members,
                       std::unique_ptr<Transport> transport, ReportFn report)
    : report_(std::move(report)),
      on_broken_(options.on_broken),
      device_(options.device),
      members_(std::move(members)),
      transport_(std::move(transport)),
      runner_(members_.get(), &plans_, transport_.get(), options.num_threads, report_),
      thread_([this] { RunJobs(); }) {}

WorkerCore::~WorkerCore() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    for (const std::unique_ptr<Job>& job : jobs_) job->cancelled.store(true);
  }
  changed_.notify_all();
  thread_.join();
}

void WorkerCore::Handle(v1::WorkerCommand command) {
  switch (command.command_case()) {
    case v1::WorkerCommand::kExpect:
      return members_->Expect(command.expect());
    case v1::WorkerCommand::kForget:
      return members_->Forget(command.forget().member());
    case v1::WorkerCommand::kCancel:
      return Cancel(command.cancel().attempt());
    default:
      break;
  }
  auto job = std::make_unique<Job>();
  job->command = std::move(command);
  {
    const std::lock_guard lock(mutex_);
    jobs_.push_back(std::move(job));
  }
  changed_.notify_all();
}

void WorkerCore::Cancel(const v1::AttemptId& attempt) {
  const std::lock_guard lock(mutex_);
  for (const std::unique_ptr<Job>& job : jobs_) {
    const v1::AttemptId& of_job = job->command.run().attempt();
    if (job->command.has_run() && of_job.epoch() == attempt.epoch() &&
        of_job.counter() == attempt.counter()) {
      job->cancelled.store(true);
    }
  }
}

void WorkerCore::RunJobs() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
    if (stopping_) return;
    Job* job = jobs_.front().get();
    lock.unlock();
    RunJob(job);
    lock.lock();
    jobs_.pop_front();
  }
}

void WorkerCore::RunJob(Job* job) {
  const v1::WorkerCommand& command = job->command;
  switch (command.command_case()) {
    case v1::WorkerCommand::kPlan:
      return AddPlanPage(command.plan());
    case v1::WorkerCommand::kRun: {
      v1::WorkerReport report;
      *report.mutable_done() = runner_.Run(command.run(), &job->cancelled);
      report_(std::move(report));
      if (transport_->broken() && on_broken_) on_broken_();
      return;
    }
    case v1::WorkerCommand::kDropPlan:
      assemblies_.erase(command.drop_plan().plan());
      return plans_.Drop(command.drop_plan().plan());
    case v1::WorkerCommand::kDropRetained:
      return runner_.DropRetained(command.drop_retained().version());
    default:
      spdlog::warn("command of the daemon is unknown: case={}",
                   static_cast<int>(command.command_case()));
  }
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
