#include "client/src/own_worker.h"

#include <utility>

namespace weightd {

OwnWorker::OwnWorker(const std::optional<SpawnSettings>& settings, const std::string& daemon,
                     WorkerSpawner::EndFn on_end)
    : binary_(settings.has_value() ? settings->binary : "") {
  if (!settings.has_value()) return;
  spawner_ = std::make_unique<WorkerSpawner>(*settings, daemon, std::move(on_end));
}

void OwnWorker::Start(const v1::StartWorker& order) {
  if (spawner_ == nullptr) return;
  device_ = order.device();
  failures_ = 0;
  attached_ = false;
  deadline_ = Clock::now() + milliseconds(order.attach_within_ms());
  spawner_->Start(order, ++order_);
}

void OwnWorker::Stop(const v1::StopWorker& order) {
  if (device_.empty() || order.device() != device_) return;
  if (order.again()) return spawner_->Kill();
  Quit();
}

void OwnWorker::Quit() {
  if (spawner_ == nullptr) return;
  ++order_;
  device_.clear();
  deadline_ = Clock::time_point::max();
  spawner_->Stop();
}

void OwnWorker::Seen(const v1::WorkerEndpoint& endpoint) {
  if (device_.empty() || endpoint.device() != device_ || endpoint.socket_path().empty()) return;
  attached_ = true;
  failures_ = 0;
  deadline_ = Clock::time_point::max();
}

std::optional<OwnWorker::Report> OwnWorker::Ended(uint64_t order, const std::string& how,
                                                  bool awaited) {
  if (order != order_ || device_.empty()) return std::nullopt;
  if (!std::exchange(attached_, false)) ++failures_;
  if (awaited && failures_ >= kStarts) return GiveUp(how);
  Report report;
  report.message.set_device(device_);
  report.message.set_how(how);
  report.error = MakeError(StatusCode::kUnavailable,
                           fmt::format("the worker that this process runs has ended and is started "
                                       "again: device={} cause={}",
                                       device_, how),
                           {.reason = reason::kWorkerLost,
                            .peer = "worker " + device_,
                            .remedy = "see what it wrote to this process's standard error"});
  return report;
}

std::optional<OwnWorker::Report> OwnWorker::Late(bool awaited) {
  deadline_ = Clock::time_point::max();
  if (!awaited || device_.empty()) return std::nullopt;
  return GiveUp("it did not attach to the daemon in time");
}

OwnWorker::Report OwnWorker::GiveUp(const std::string& how) {
  Report report;
  report.message.set_device(device_);
  report.message.set_how(how);
  report.message.set_given_up(true);
  report.error = MakeError(
      StatusCode::kFailedPrecondition,
      fmt::format("the worker does not start: device={} program={} cause={}", device_, binary_,
                  how),
      {.reason = reason::kWorkerStart,
       .peer = "worker " + device_,
       .remedy = "see what it wrote to this process's standard error; use the weightd of the "
                 "daemon's release, and check that this process may start it"});
  Quit();
  return report;
}

}  // namespace weightd
