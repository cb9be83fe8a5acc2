#include "daemon/sync/coordinator.h"

#include <algorithm>

#include "daemon/base/log.h"
#include "daemon/sync/catch_up.h"
#include "daemon/sync/room_host.h"

namespace weightd {
namespace {

constexpr size_t kHistory = 32;

}  // namespace

Coordinator::Coordinator(Config config, std::shared_ptr<const LoaderRegistry> loaders,
                         VersionStore& store, SyncObserver& observer)
    : config_(std::move(config)),
      loaders_(std::move(loaders)),
      store_(store),
      observer_(observer),
      spawned_(config_.worker,
               [this](const std::string& device) { observer_.OnWorkerRestart(device); }) {
  policy_.always_wire = config_.sync.always_wire;
}

Coordinator::~Coordinator() {
  {
    const std::lock_guard lock(mu_);
    stopping_ = draining_ = true;
    for (auto& [name, room] : rooms_) {
      Event event;
      event.kind = Event::Kind::kShutdown;
      event.status = Error(StatusCode::kUnavailable, reason::kDraining,
                           "sync again after its restart", "the daemon is shutting down");
      Post(*room, event);
    }
  }
  jobs_changed_.notify_all();
  for (auto& [name, room] : rooms_) {
    if (room->thread.joinable()) room->thread.join();
  }
}

ModelRoom& Coordinator::RoomFor(const std::string& model) {
  std::unique_ptr<ModelRoom>& room = rooms_[model];
  if (room == nullptr) {
    room =
        std::make_unique<ModelRoom>(model, store_.Highest(model), loaders_, config_.sync,
                                    [this](double seconds) { observer_.OnPlanCompiled(seconds); });
    room->plans.SetPolicy(policy_);
    room->thread = std::jthread([this, raw = room.get()] { RunJobs(*raw); });
  }
  return *room;
}

void Coordinator::Post(ModelRoom& room, const Event& event) {
  for (const Job& job : room.jobs) job.mailbox->Post(event);
}

void Coordinator::Enqueue(ModelRoom& room, Job job) {
  room.jobs.push_back(std::move(job));
  jobs_changed_.notify_all();
}

void Coordinator::RunJobs(ModelRoom& room) {
  std::unique_lock lock(mu_);
  while (true) {
    jobs_changed_.wait(lock, [&] { return stopping_ || !room.jobs.empty(); });
    if (room.jobs.empty()) return;
    const Job job = room.jobs.front();
    room.running = true;
    if (job.sync != nullptr) {
      room.live = SyncView{.running = true, .version = job.version};
      room.sync_start = room.phase_start = Clock::now();
      lock.unlock();
      const SyncReport report = job.sync->Run();
      lock.lock();
      FinishSync(room, report);
    } else if (job.catch_up != nullptr) {
      RunCatchUp(room, job, lock);
    } else {
      RunRetain(room, job, lock);
    }
    room.jobs.pop_front();
    room.running = false;
    jobs_changed_.notify_all();
  }
}

void Coordinator::FinishSync(ModelRoom& room, const SyncReport& report) {
  room.live = SyncView{};
  for (const auto& [phase, micros] : report.phases) {
    if (phase == Phase::kTransfer && micros > 0 && report.bytes > 0) {
      room.last_bytes_per_second =
          static_cast<double>(report.bytes) / (static_cast<double>(micros) * 1e-6);
    }
  }
  room.history.push_front(report);
  if (room.history.size() > kHistory) room.history.pop_back();
  observer_.OnSyncEnd(room.model.name(), report);
  if (report.error.ok()) {
    spdlog::info("sync done: model={} version={} attempt={} bytes={}", room.model.name(),
                 report.version, ToString(report.attempt), report.bytes);
  } else {
    const ErrorFields fields = FieldsOf(report.error);
    spdlog::warn("sync failed: {} model={} version={} phase={} reason={} peer={}",
                 Message(report.error), room.model.name(), report.version, fields.phase,
                 fields.reason, fields.peer);
  }
  for (const auto& replica : room.model.replicas()) (void)MaybeCatchUp(room, replica);
  MaybeRetain(room);
}

void Coordinator::RequestSync(ActorSession& session, SyncRequest request) {
  const std::lock_guard lock(mu_);
  if (session.room == nullptr) return;
  ModelRoom& room = *session.room;
  request.member = session.member;
  request.rank = session.identity.rank;
  request.port = session.port;
  if (draining_) {
    SyncReport report;
    report.version = request.version;
    report.error = Error(StatusCode::kUnavailable, reason::kDraining,
                         "sync again after its restart", "the daemon is shutting down");
    request.port->SendReport(request.request, report);
    return;
  }
  for (const Job& job : room.jobs) {
    if (job.sync == nullptr || job.host->group() != session.group.get()) continue;
    if (job.sync->AddRequest(request)) return;
  }
  Job job;
  job.mailbox = std::make_shared<Mailbox>();
  job.host = std::make_shared<RoomHost>(*this, room, session.group);
  job.sync = std::make_shared<SyncSession>(*job.host, *job.mailbox, request.version);
  job.version = request.version;
  (void)job.sync->AddRequest(std::move(request));
  Enqueue(room, std::move(job));
}

template <typename Session>
void Coordinator::PostFrom(const Session& session, Event event) {
  const std::lock_guard lock(mu_);
  if (session.room == nullptr) return;
  event.member = session.member;
  Post(*session.room, event);
}

void Coordinator::CancelSync(ActorSession& session) {
  PostFrom(session, {.kind = Event::Kind::kCancelled});
}

void Coordinator::Quiesced(EngineSession& session, AttemptId attempt, const Status& status) {
  PostFrom(session, {.kind = Event::Kind::kQuiesced, .attempt = attempt, .status = status});
}

void Coordinator::Converted(EngineSession& session, AttemptId attempt, uint32_t stage,
                            const Status& status) {
  Event event{.kind = Event::Kind::kConverted, .attempt = attempt, .status = status};
  event.stage = stage;
  PostFrom(session, std::move(event));
}

void Coordinator::Committed(EngineSession& session, AttemptId attempt, const Status& status,
                            std::vector<std::string> caches_reset) {
  Event event{.kind = Event::Kind::kCommitted, .attempt = attempt, .status = status};
  event.caches = std::move(caches_reset);
  PostFrom(session, std::move(event));
}

void Coordinator::WorkerUp(std::shared_ptr<WorkerPort> worker, uint32_t pid) {
  const std::lock_guard lock(mu_);
  const std::string device = worker->device();
  // The successor may be here before the end of its predecessor's stream is seen.
  if (workers_.contains(device)) {
    LoseWorker(device, WithPeer(Error(StatusCode::kUnavailable, reason::kWorkerLost,
                                      "clients attach again by themselves: sync again",
                                      "the worker was replaced: device={}", device),
                                "worker " + device));
  }
  LearnPeers(*worker);
  workers_[device] = std::move(worker);
  spawned_.Up(device, pid);
  for (auto& [id, info] : members_) {
    info.attached.erase(device);
    if (!info.lent.contains(device)) continue;
    const WorkerEndpoint endpoint = Announce(id, info, device);
    if (auto actor = info.actor.lock()) actor->SendWorkerChanged(endpoint);
    if (auto engine = info.engine.lock()) engine->SendWorkerChanged(endpoint);
  }
}

/// Which GPUs this worker's can access decides on paths. \pre mu_ is held
void Coordinator::LearnPeers(const WorkerPort& worker) {
  if (!IsGpuDevice(worker.device())) return;
  policy_.peers[std::string(GpuOf(worker.device()))] = worker.facts().peers;
  for (auto& [name, room] : rooms_) room->plans.SetPolicy(policy_);
}

void Coordinator::WorkerDown(const WorkerPort* worker, const Status& cause) {
  const std::lock_guard lock(mu_);
  const std::string device = worker->device();
  const auto it = workers_.find(device);
  if (it != workers_.end() && it->second.get() == worker) LoseWorker(device, cause);
}

/// Running syncs hear of it. \pre mu_ is held
void Coordinator::LoseWorker(const std::string& device, const Status& cause) {
  workers_.erase(device);
  for (auto& [id, info] : members_) info.attached.erase(device);
  for (auto& [name, room] : rooms_) {
    room->plans.ForgetLoaded(device);
    const auto& kept = room->retained_devices;
    if (std::find(kept.begin(), kept.end(), device) != kept.end()) room->retained_version = 0;
    Event event;
    event.kind = Event::Kind::kWorkerLost;
    event.device = device;
    event.status = cause;
    Post(*room, event);
  }
  spawned_.Down(device);
}

std::shared_ptr<OwnerPort> Coordinator::WorkerOwner(const std::string& device,
                                                    const std::string& token) {
  const std::lock_guard lock(mu_);
  return spawned_.Owner(device, token);
}

void Coordinator::WorkerEnded(const OwnerPort* client, const std::string& device,
                              const std::string& how, bool given_up) {
  const std::lock_guard lock(mu_);
  spawned_.Ended(client, device, how, given_up);
}

std::vector<SpawnedWorkers::View> Coordinator::SpawnedViews() {
  const std::lock_guard lock(mu_);
  return spawned_.Views();
}

void Coordinator::MemberAttached(const std::string& device, MemberId member, const Status& status) {
  const std::lock_guard lock(mu_);
  const auto it = members_.find(member);
  if (it == members_.end()) return;
  if (!status.ok()) {
    spdlog::warn("cannot map a member's memory: {} member={} device={}", Message(status),
                 it->second.label, device);
    return;
  }
  it->second.attached.insert(device);
  Event event;
  event.kind = Event::Kind::kAttached;
  event.member = member;
  event.device = device;
  Post(*it->second.room, event);
}

void Coordinator::MemberLost(const std::string& device, MemberId member, const std::string& cause) {
  const std::lock_guard lock(mu_);
  const auto it = members_.find(member);
  if (it == members_.end()) return;  // it left on purpose
  MemberInfo& info = it->second;
  info.attached.erase(device);
  Event event;
  event.kind = info.writable ? Event::Kind::kEngineLost : Event::Kind::kActorLost;
  event.member = member;
  event.device = device;
  event.status =
      WithPeer(Error(StatusCode::kUnavailable, reason::kPeerLost, "start it again, then sync",
                     "the memory of {} is gone: {}", info.label, cause),
               info.label);
  Post(*info.room, event);
}

void Coordinator::WorkerEvent(const Event& event) {
  const std::lock_guard lock(mu_);
  for (auto& [name, room] : rooms_) Post(*room, event);
}

void Coordinator::Drain(milliseconds limit) {
  std::unique_lock lock(mu_);
  draining_ = true;
  jobs_changed_.wait_for(lock, limit, [this] {
    return std::all_of(rooms_.begin(), rooms_.end(),
                       [](const auto& item) { return item.second->jobs.empty(); });
  });
}

std::vector<std::string> Coordinator::MissingWorkers() {
  const std::lock_guard lock(mu_);
  std::vector<std::string> missing;
  for (const std::string& device : config_.devices) {
    if (!workers_.contains(device)) missing.push_back(device);
  }
  return missing;
}

void Coordinator::Observe(const ModelRoom& room, const Replica& replica) {
  observer_.OnReplica(room.model.name(), replica.engine, replica.dp_rank, replica.state,
                      replica.version);
}

}  // namespace weightd
