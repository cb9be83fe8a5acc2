#include "client/src/actor_client.h"

#include <algorithm>
#include <utility>

#include "client/src/pages.h"
#include "client/src/process_identity.h"
#include "client/src/result_json.h"
#include "daemon/layout/table_digest.h"
#include "daemon/wire/convert.h"

namespace weightd {
namespace {

std::string Text(const char* text) { return text == nullptr ? "" : text; }

/// The shards of one sync, from the caller's numbering to ours.
StatusOr<std::vector<StagedShard>> ReadStaged(std::span<const weightd_staged> staged,
                                              const ActorRegistration& registration) {
  std::vector<StagedShard> shards;
  for (const weightd_staged& entry : staged) {
    const auto& first = registration.caller_first;
    if (entry.tensor >= registration.table.size() ||
        entry.shard >= first[entry.tensor + 1] - first[entry.tensor]) {
      return Error(StatusCode::kInvalidArgument, reason::kUnknownTensor,
                   "stage only tensors that were registered, by their position",
                   "staged shard was not registered: tensor={} shard={}", entry.tensor,
                   entry.shard);
    }
    const int64_t position = registration.caller_shard[first[entry.tensor] + entry.shard];
    if (position < 0) continue;  // an empty box needs no memory
    const TensorInfo& tensor = registration.table[entry.tensor];
    if (registration.memory[static_cast<size_t>(position)].segment.has_value()) {
      return WithTensor(Error(StatusCode::kInvalidArgument, reason::kMemoryMoved,
                              "register the tensor without shared memory to stage it",
                              "tensor is lent and cannot be staged: tensor={}", tensor.name),
                        tensor.name);
    }
    shards.push_back({static_cast<size_t>(position), static_cast<const std::byte*>(entry.address),
                      Dims(std::span(entry.strides, static_cast<size_t>(tensor.shape.size())))});
  }
  return shards;
}

}  // namespace

ActorClient::ActorClient(SessionSettings settings, Identity identity)
    : Session(std::move(settings)), identity_(std::move(identity)) {}

std::string ActorClient::rank_label() const { return fmt::format("actor {}", identity_.rank); }

Status ActorClient::Register(std::span<const weightd_tensor> tensors) {
  auto read = ReadTensors(tensors);
  if (!read.ok()) return WithRank(read.status(), rank_label());
  const Status fenced = PrepareFence(&*read);
  if (!fenced.ok()) return WithRank(fenced, rank_label());
  auto registration = std::make_shared<const ActorRegistration>(*std::move(read));
  {
    const std::lock_guard lock(mutex_);
    if (sync_state_ == SyncState::kRunning) {
      return Error(StatusCode::kFailedPrecondition, reason::kInternal,
                   "wait for the sync or cancel it before registering again", "a sync is running");
    }
  }
  return RegisterAndWait([this, registration] {
    staged_ = std::make_shared<StagedMemory>(registration);
    const std::lock_guard lock(mutex_);
    registration_ = registration;
  });
}

/// Makes the event that stands for the trainer's GPU work, if the memory is a GPU's.
Status ActorClient::PrepareFence(ActorRegistration* registration) {
  const CudaSegmentSet& cuda = registration->segments.cuda();
  if (cuda.empty()) return absl::OkStatus();
  // Kept as long as it fits: a refused registration leaves the one before, and its event, in force.
  if (!fence_.valid() || fence_.device() != cuda.ordinal()) {
    WEIGHTD_ASSIGN_OR_RETURN(fence_, CudaFence::Create(cuda.ordinal()));
  }
  registration->event = fence_.handle();
  return absl::OkStatus();
}

Status ActorClient::SyncBegin(const weightd_sync_options& options) {
  std::unique_lock lock(mutex_);
  if (!view_.fatal.ok()) return view_.fatal;
  if (!view_.has_registration) {
    return Error(StatusCode::kFailedPrecondition, reason::kMissingTensor,
                 "call register before sync", "nothing is registered");
  }
  if (sync_state_ != SyncState::kIdle) {
    return Error(StatusCode::kFailedPrecondition, reason::kInternal,
                 "wait for the sync that was begun before the next", "a sync is running");
  }
  WEIGHTD_ASSIGN_OR_RETURN(std::vector<StagedShard> staged,
                           ReadStaged({options.staged, options.num_staged}, *registration_));
  const CudaSegmentSet& cuda = registration_->segments.cuda();
  if (!cuda.empty()) {
    WEIGHTD_RETURN_IF_ERROR(fence_.Record(static_cast<CUstream_st*>(options.cuda_stream)));
  }
  v1::ActorSync message;
  message.set_version(options.version);
  message.set_require_replicas(options.require_replicas);
  message.set_check_replicas(options.check_replicas != 0);
  message.set_request(next_request_++);
  if (options.refuse_reason != nullptr) {
    *message.mutable_refused() =
        ToProto(MakeError(StatusCode::kFailedPrecondition, Text(options.refuse_message),
                          {.reason = options.refuse_reason,
                           .tensor = Text(options.refuse_tensor),
                           .rank = rank_label(),
                           .remedy = Text(options.refuse_remedy)}));
  }
  const Status alive = cuda.CheckAlive();
  if (!alive.ok() && !message.has_refused()) {
    *message.mutable_refused() = ToProto(WithRank(alive, rank_label()));
  }
  sync_state_ = SyncState::kRunning;
  phase_ = "admit";
  bytes_done_ = bytes_total_ = 0;
  lock.unlock();
  Post([this, message = std::move(message), staged = std::move(staged)] {
    StartSync(message, staged);
  });
  return absl::OkStatus();
}

/// A rank that lacks memory takes part by refusing, so that no other rank waits for it.
void ActorClient::StartSync(v1::ActorSync message, const std::vector<StagedShard>& staged) {
  const Status missing = staged_->Begin(staged);
  if (!missing.ok() && !message.has_refused()) {
    *message.mutable_refused() = ToProto(WithRank(missing, rank_label()));
  }
  sync_ = Running{std::move(message), false, Clock::now() + settings_.connect_timeout};
}

Clock::time_point ActorClient::HandleTime() {
  if (!sync_.has_value() || sync_->sent) return Clock::time_point::max();
  if (lent()) {
    v1::ActorRequest request;
    *request.mutable_sync() = sync_->message;
    sync_->sent = true;
    Send(request);
    return Clock::time_point::max();
  }
  if (Clock::now() < sync_->send_by) return sync_->send_by;
  Status cause;
  {
    const std::lock_guard lock(mutex_);
    cause = view_.last_error;
  }
  const bool known = !cause.ok();
  ErrorFields fields = FieldsOf(cause);
  if (!known) fields.reason = reason::kDaemonLost;
  fields.phase = "admit";
  fields.rank = rank_label();
  if (fields.remedy.empty()) fields.remedy = "check that weightd and its worker are running";
  EndSync(MakeError(
              known ? cause.code() : StatusCode::kUnavailable,
              fmt::format("registration did not come back in time: waited ms={} cause={}",
                          settings_.connect_timeout.count(), known ? Message(cause) : "no answer"),
              fields),
          "");
  return Clock::time_point::max();
}

std::optional<SyncOutcome> ActorClient::SyncWait(int timeout_ms) {
  std::unique_lock lock(mutex_);
  if (sync_state_ == SyncState::kIdle) {
    return SyncOutcome{Error(StatusCode::kFailedPrecondition, reason::kInternal,
                             "call sync_begin first", "no sync was begun"),
                       ""};
  }
  const auto ended = [this] { return sync_state_ == SyncState::kEnded; };
  if (timeout_ms < 0) {
    changed_.wait(lock, ended);
  } else if (!changed_.wait_for(lock, milliseconds(timeout_ms), ended)) {
    return std::nullopt;
  }
  sync_state_ = SyncState::kIdle;
  phase_.clear();
  return std::exchange(outcome_, {});
}

void ActorClient::Cancel() {
  Post([this] {
    if (!sync_.has_value()) return;
    if (!sync_->sent) {
      return EndSync(Error(StatusCode::kCancelled, reason::kCancelled, "sync again",
                           "sync was cancelled before it began"),
                     "");
    }
    v1::ActorRequest request;
    request.mutable_cancel()->set_request(sync_->message.request());
    Send(request);
  });
}

std::string ActorClient::StateJson() const {
  const std::lock_guard lock(mutex_);
  return Dump({{"connected", view_.connected},
               {"registered", view_.registered},
               {"phase", phase_},
               {"bytes_done", bytes_done_},
               {"bytes_total", bytes_total_},
               {"worker", view_.worker},
               {"error", ErrorJson(view_.fatal.ok() ? view_.last_error : view_.fatal)}});
}

ActorClient::Request ActorClient::Hello() {
  Request request;
  v1::ActorHello* hello = request.mutable_hello();
  *hello->mutable_protocol() = ThisProtocol();
  *hello->mutable_process() = ThisProcess();
  hello->set_model(identity_.model);
  hello->set_group(identity_.group);
  hello->set_group_order(identity_.group_order);
  hello->set_rank(identity_.rank);
  hello->set_world_size(identity_.world_size);
  hello->set_spawns_worker(spawns_worker());
  return request;
}

std::vector<ActorClient::Request> ActorClient::Registration() {
  std::vector<Request> requests;
  for (v1::ShardsPage& page : ShardsPages(registration_->shards)) {
    *requests.emplace_back().mutable_shards() = std::move(page);
  }
  v1::ActorRegister* last = requests.emplace_back().mutable_register_();
  const auto digest = CanonicalTableDigest(registration_->table);
  last->set_table_digest(digest.data(), digest.size());
  last->set_num_tensors(static_cast<uint32_t>(registration_->table.size()));
  last->set_staged(registration_->staged);
  const std::string gpu = registration_->segments.cuda().worker_device();
  last->set_device(gpu.empty() ? identity_.device : gpu);
  return requests;
}

std::shared_ptr<const MemoryOffer> ActorClient::Offer() {
  auto offer = std::make_shared<MemoryOffer>();
  offer->segments = SegmentFrames(registration_->segments, registration_->event);
  offer->bindings = ActorBindings(*registration_);
  offer->wants_ring = registration_->staged;
  offer->fill = [staged = staged_](const v1::RingFill& fill, std::span<std::byte> slot) {
    return staged->Fill(fill, slot);
  };
  offer->owner = registration_;
  return offer;
}

void ActorClient::SendTable() {
  for (v1::TensorTablePage& page : TablePages(registration_->table)) {
    Request request;
    *request.mutable_table() = std::move(page);
    Send(request);
  }
}

void ActorClient::HandleEvent(const v1::ActorEvent& event) {
  if (event.has_table_wanted()) return SendTable();
  if (!sync_.has_value()) return;
  const uint64_t request = sync_->message.request();
  if (event.has_progress() && event.progress().request() == request) {
    const v1::SyncProgress& progress = event.progress();
    return Publish([this, &progress](View&) {
      phase_ = PhaseName(progress.phase());
      bytes_done_ = progress.bytes_done();
      bytes_total_ = progress.bytes_total();
    });
  }
  if (event.has_result() && event.result().request() == request) {
    EndSync(FromProto(event.result().error()), Dump(ResultJson(event.result())));
  }
}

void ActorClient::HandleError(const Status& error) {
  if (sync_.has_value() && sync_->sent) EndSync(error, "");
}

void ActorClient::HandleLost(const Status& cause) {
  if (!sync_.has_value()) return;
  const bool final = cause.code() != StatusCode::kUnavailable;
  if (!sync_->sent && !final) return;  // waits for the daemon until send_by
  std::string phase;
  {
    const std::lock_guard lock(mutex_);
    phase = phase_;
  }
  EndSync(WithRank(WithPhase(cause, phase), rank_label()), "");
}

void ActorClient::EndSync(Status status, std::string result_json) {
  sync_.reset();
  staged_->End();
  Publish([this, &status, &result_json](View&) {
    sync_state_ = SyncState::kEnded;
    outcome_ = {std::move(status), std::move(result_json)};
  });
}

}  // namespace weightd
