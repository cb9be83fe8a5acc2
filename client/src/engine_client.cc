#include "client/src/engine_client.h"

#include <algorithm>
#include <utility>

#include "client/src/pages.h"
#include "client/src/process_identity.h"
#include "client/src/result_json.h"
#include "daemon/base/worker_command.h"
#include "daemon/layout/stages.h"
#include "daemon/wire/convert.h"

namespace weightd {

EngineClient::EngineClient(SessionSettings settings, Identity identity)
    : Session(std::move(settings)), identity_(std::move(identity)), incarnation_(RandomToken()) {}

std::string EngineClient::label() const {
  return fmt::format("engine {} tp {}", identity_.engine, identity_.coordinates.tp_rank);
}

Status EngineClient::Register(std::span<const weightd_param> params, const weightd_trace* trace) {
  auto read = ReadParams(params);
  if (!read.ok()) return WithRank(read.status(), label());
  const bool pulls = std::any_of(read->params.begin(), read->params.end(),
                                 [](const ParamInfo& param) { return param.pulled; });
  if (identity_.auto_quiesce && (pulls || NumStages(read->params) > 1)) {
    return WithRank(Error(StatusCode::kInvalidArgument, reason::kConfig,
                          "open the engine without auto_quiesce and convert every stage",
                          "an engine that answers by itself cannot have {} stages to convert",
                          NumStages(read->params)),
                    label());
  }
  if (trace != nullptr) {
    auto traced = ReadTrace(*trace, read->params);
    if (!traced.ok()) return WithRank(traced.status(), label());
    read->trace = *std::move(traced);
    read->prefer_trace = trace->preferred != 0;
  }
  auto registration = std::make_shared<const EngineRegistration>(*std::move(read));
  return RegisterAndWait([this, registration] { registration_ = registration; });
}

std::string EngineClient::StateJson() const {
  const std::lock_guard lock(mutex_);
  const Status& error = !view_.fatal.ok()        ? view_.fatal
                        : !view_.last_error.ok() ? view_.last_error
                                                 : truth_.error();
  return Dump(
      {{"connected", view_.connected},
       {"registered", view_.registered},
       {"state", StateName(truth_.state())},
       {"version", truth_.version()},
       {"dirty", truth_.dirty()},
       {"attempt", AttemptText(truth_.attempt())},
       {"pending", PendingName(truth_.pending())},
       {"stage", truth_.stage()},
       {"offered", truth_.offered()},
       {"idle",
        {{"count", idle_.count}, {"version", idle_.version}, {"error", ErrorJson(idle_.error)}}},
       {"worker", view_.worker},
       {"error", ErrorJson(error)}});
}

uint64_t EngineClient::Wait(uint64_t since, int timeout_ms) {
  std::unique_lock lock(mutex_);
  const auto changed = [this, since] { return view_.changes != since; };
  if (timeout_ms < 0) {
    changed_.wait(lock, changed);
  } else {
    changed_.wait_for(lock, milliseconds(timeout_ms), changed);
  }
  return view_.changes;
}

Status EngineClient::Quiesced(const Status& outcome) {
  Status valid;
  v1::AttemptId attempt;
  Publish([&](View&) {
    valid = truth_.Quiesced();
    attempt = truth_.attempt();
  });
  if (!valid.ok()) return valid;
  Post([this, attempt, outcome] { SendQuiesced(attempt, outcome); });
  return absl::OkStatus();
}

Status EngineClient::Converted(const Status& outcome) {
  Status valid;
  v1::AttemptId attempt;
  uint32_t stage = 0;
  Publish([&](View&) {
    stage = truth_.stage();
    valid = truth_.Converted();
    attempt = truth_.attempt();
  });
  if (!valid.ok()) return valid;
  Post([this, attempt, stage, outcome] { SendConverted(attempt, stage, outcome); });
  return absl::OkStatus();
}

Status EngineClient::Committed(const Status& outcome,
                               const std::vector<std::string>& caches_reset) {
  Status valid;
  v1::AttemptId attempt;
  Publish([&](View&) {
    valid = truth_.Committed(outcome.ok());
    attempt = truth_.attempt();
  });
  if (!valid.ok()) return valid;
  Post([this, attempt, outcome, caches_reset] { SendCommitted(attempt, outcome, caches_reset); });
  return absl::OkStatus();
}

EngineClient::Request EngineClient::Hello() {
  Request request;
  v1::EngineHello* hello = request.mutable_hello();
  *hello->mutable_protocol() = ThisProtocol();
  *hello->mutable_process() = ThisProcess();
  hello->set_model(identity_.model);
  hello->set_engine(identity_.engine);
  *hello->mutable_coordinates() = ToProto(identity_.coordinates);
  hello->set_incarnation(incarnation_);
  hello->set_num_ranks(
      static_cast<uint32_t>(identity_.coordinates.tp_size * identity_.coordinates.pp_size));
  hello->set_spawns_worker(spawns_worker());
  const std::lock_guard lock(mutex_);
  hello->set_held_version(truth_.version());
  *hello->mutable_held_attempt() = truth_.attempt();
  hello->set_dirty(truth_.dirty());
  return request;
}

std::vector<EngineClient::Request> EngineClient::Registration() {
  std::vector<Request> requests;
  for (v1::ParamsPage& page : ParamsPages(registration_->params)) {
    *requests.emplace_back().mutable_params() = std::move(page);
  }
  const TracedLayout* trace = registration_->trace.get();
  if (trace != nullptr) {
    for (v1::TracePage& page : TracePages(*trace)) {
      *requests.emplace_back().mutable_trace() = std::move(page);
    }
  }
  v1::EngineRegister* last = requests.emplace_back().mutable_register_();
  if (trace != nullptr) {
    last->set_num_traced_sources(static_cast<uint32_t>(trace->sources().size()));
    last->set_num_traced_writes(trace->writes().size());
    last->set_prefer_trace(registration_->prefer_trace);
  }
  last->set_architecture(identity_.architecture);
  last->set_profile(identity_.profile);
  last->set_config_json(identity_.config_json);
  last->set_num_params(static_cast<uint32_t>(registration_->params.size()));
  last->set_commit_mode(identity_.commit_mode);
  const std::string gpu = registration_->segments.cuda().worker_device();
  last->set_device(gpu.empty() ? identity_.device : gpu);
  return requests;
}

std::shared_ptr<const MemoryOffer> EngineClient::Offer() {
  auto offer = std::make_shared<MemoryOffer>();
  offer->segments = SegmentFrames(registration_->segments);
  offer->bindings = EngineBindings(*registration_);
  offer->owner = registration_;
  return offer;
}

void EngineClient::HandleEvent(const v1::EngineEvent& event) {
  if (event.has_prepare()) return OnPrepare(event.prepare());
  if (event.has_convert()) return OnConvert(event.convert());
  if (event.has_commit()) return OnCommit(event.commit());
  if (event.has_outcome()) {
    Publish([this, &event](View&) { truth_.Outcome(event.outcome()); });
  }
  if (event.has_idle()) {
    Publish([this, &event](View&) {
      idle_ = {idle_.count + 1, event.idle().version(), FromProto(event.idle().error())};
    });
  }
}

void EngineClient::OnPrepare(const v1::EnginePrepare& prepare) {
  Status accepted = registration_->segments.cuda().CheckAlive();
  if (!accepted.ok()) return SendQuiesced(prepare.attempt(), accepted);
  Publish([&](View&) {
    accepted = truth_.Prepare(prepare);
    if (accepted.ok() && identity_.auto_quiesce) accepted = truth_.Quiesced();
  });
  if (identity_.auto_quiesce || !accepted.ok()) SendQuiesced(prepare.attempt(), accepted);
}

void EngineClient::OnConvert(const v1::EngineConvert& convert) {
  Status accepted;
  Publish([&](View&) { accepted = truth_.Convert(convert); });
  if (!accepted.ok()) SendConverted(convert.attempt(), convert.stage(), accepted);
}

void EngineClient::OnCommit(const v1::EngineCommit& commit) {
  Status accepted;
  Publish([&](View&) {
    accepted = truth_.Commit(commit);
    if (accepted.ok() && identity_.auto_quiesce) accepted = truth_.Committed(true);
  });
  if (identity_.auto_quiesce || !accepted.ok()) SendCommitted(commit.attempt(), accepted, {});
}

void EngineClient::SendQuiesced(const v1::AttemptId& attempt, const Status& outcome) {
  Request request;
  *request.mutable_quiesced()->mutable_attempt() = attempt;
  if (!outcome.ok()) {
    *request.mutable_quiesced()->mutable_error() = ToProto(WithRank(outcome, label()));
  }
  Send(request);
}

void EngineClient::SendConverted(const v1::AttemptId& attempt, uint32_t stage,
                                 const Status& outcome) {
  Request request;
  v1::EngineConverted* converted = request.mutable_converted();
  *converted->mutable_attempt() = attempt;
  converted->set_stage(stage);
  if (!outcome.ok()) *converted->mutable_error() = ToProto(WithRank(outcome, label()));
  Send(request);
}

void EngineClient::SendCommitted(const v1::AttemptId& attempt, const Status& outcome,
                                 const std::vector<std::string>& caches_reset) {
  Request request;
  v1::EngineCommitted* committed = request.mutable_committed();
  *committed->mutable_attempt() = attempt;
  if (!outcome.ok()) *committed->mutable_error() = ToProto(WithRank(outcome, label()));
  for (const std::string& cache : caches_reset) committed->add_caches_reset(cache);
  Send(request);
}

void EngineClient::HandleError(const Status& error) {
  Publish([&error](View& view) { view.last_error = error; });
}

void EngineClient::HandleLost(const Status& cause) {
  Publish([this, &cause](View&) { truth_.DaemonLost(cause); });
}

void EngineClient::HandleClose() {
  Request request;
  request.mutable_released();
  Send(request);
}

}  // namespace weightd
