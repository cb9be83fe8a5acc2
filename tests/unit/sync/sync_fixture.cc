#include "tests/unit/sync/sync_fixture.h"

#include <algorithm>

namespace weightd {
namespace {

class FakeEngine : public EnginePort {
 public:
  FakeEngine(SyncFixture& fixture, MemberId member, std::string name)
      : fixture_(fixture), member_(member), name_(std::move(name)) {}

  void SendPrepare(AttemptId attempt, uint64_t, bool) override {
    if (fixture_.script.on_prepare) return fixture_.script.on_prepare(member_, attempt);
    fixture_.mailbox.Post({.kind = Event::Kind::kQuiesced, .member = member_, .attempt = attempt});
  }
  void SendConvert(AttemptId attempt, uint32_t stage) override {
    fixture_.worker_log.push_back(fmt::format("{} converts {}", name_, stage));
    if (fixture_.script.on_convert) return fixture_.script.on_convert(member_, attempt, stage);
    fixture_.mailbox.Post(
        {.kind = Event::Kind::kConverted, .member = member_, .attempt = attempt, .stage = stage});
  }
  void SendCommit(AttemptId attempt, uint64_t) override {
    if (fixture_.script.on_commit) return fixture_.script.on_commit(member_, attempt);
    fixture_.mailbox.Post({.kind = Event::Kind::kCommitted, .member = member_, .attempt = attempt});
  }
  void SendOutcome(AttemptId, const ReplicaOutcome& outcome, bool untouched) override {
    fixture_.outcomes.push_back(name_ + (outcome.committed ? ": committed"
                                         : untouched       ? ": untouched"
                                                     : ": " + std::string(Name(outcome.state))));
  }
  void SendIdle(uint64_t version, const Status& why) override {
    fixture_.idle.push_back(
        fmt::format("{}: {} {}", name_, version, why.ok() ? "ok" : FieldsOf(why).reason));
  }
  void SendWorkerChanged(const WorkerEndpoint&) override {}
  void SendStartWorker(const WorkerOrder&) override {}
  void SendStopWorker(const std::string&, bool, const std::string&) override {}

 private:
  SyncFixture& fixture_;
  const MemberId member_;
  const std::string name_;
};

class FakeWorker : public WorkerPort {
 public:
  FakeWorker(SyncFixture& fixture, std::string device)
      : fixture_(fixture), device_(std::move(device)) {}
  std::string device() const override { return device_; }
  std::string socket_path() const override { return "none"; }
  WorkerFacts facts() const override { return fixture_.facts[device_]; }
  void SendExpect(MemberId, const std::string&, bool, const std::string&) override {}
  void SendForget(MemberId) override {}
  void SendPlan(const WorkerPlan& plan) override {
    Log("plan");
    Digest128 digest = plan.digest;
    if (fixture_.script.on_plan) digest = fixture_.script.on_plan(device_, digest);
    fixture_.mailbox.Post({.kind = Event::Kind::kPlanLoaded,
                           .device = device_,
                           .plan = plan.handle,
                           .digest = digest});
  }
  void SendDropPlan(uint64_t) override {}
  void SendStep(const StepCommand& command) override {
    const std::string round = command.round == 0 ? "" : fmt::format("+{}", command.round);
    Log((command.step == Step::kTransfer ? "transfer"
         : command.follows               ? "follow"
         : command.step == Step::kVerify ? "verify"
                                         : "check") +
        round);
    if (command.step == Step::kTransfer) fixture_.wires_used.push_back(command.wire);
    if (command.follows) following_ = command;
    if (fixture_.script.on_step) return fixture_.script.on_step(device_, command);
    if (!command.follows) fixture_.StepDone(device_, command);
  }
  void SendCancel(AttemptId) override {
    Log("cancel");
    if (fixture_.script.on_cancel) fixture_.script.on_cancel(device_);
  }
  void SendLanded(const LandedMark& mark) override {
    Log(mark.writes == kAllWrites ? fmt::format("landed {} all", mark.target)
                                  : fmt::format("landed {} {}", mark.target, mark.writes));
    if (fixture_.script.on_landed) return fixture_.script.on_landed(device_, mark);
    if (mark.writes == kAllWrites) fixture_.StepDone(device_, following_);
  }
  void SendMakeWireId(uint64_t wire) override {
    Log("make wire");
    fixture_.mailbox.Post(
        {.kind = Event::Kind::kWireId, .device = device_, .wire = wire, .wire_id = "id"});
  }
  void SendOpenWire(const WireOffer& offer) override {
    Log("open wire");
    if (offer.id != "id") return;
    if (fixture_.script.on_open_wire) return fixture_.script.on_open_wire(device_, offer);
    fixture_.WireReady(device_, offer.wire);
  }
  void SendCloseWire(uint64_t) override { Log("close wire"); }
  void Kill(const std::string&) override {
    fixture_.workers_killed.insert(device_);
    fixture_.LoseWorker(device_);
  }

 private:
  void Log(std::string what) {
    if (device_ != kHostDevice) what += " " + device_;
    fixture_.worker_log.push_back(std::move(what));
  }

  SyncFixture& fixture_;
  const std::string device_;
  StepCommand following_;  ///< answered when all has landed
};

std::shared_ptr<const ActorRank> MakeActor(int rank, const Scene& scene) {
  auto actor = std::make_shared<ActorRank>();
  actor->member = static_cast<MemberId>(rank + 1);
  actor->rank = rank;
  actor->label = fmt::format("actor {}", rank);
  actor->device = scene.actor_devices[static_cast<size_t>(rank)];
  const int64_t half = scene.elements / 2;
  actor->shards.boxes = {scene.replicated ? Box{{0}, {scene.elements}}
                                          : Box{{half * rank}, {half}}};
  actor->shards.first = {0, 1};
  actor->shards.box_index = {0};
  return actor;
}

}  // namespace

SyncFixture::SyncFixture(const Scene& scene) : scene_(scene) {
  for (milliseconds* limit : {&sync_options.admit, &sync_options.prepare, &sync_options.transfer,
                              &sync_options.verify, &sync_options.commit}) {
    *limit = milliseconds(300);
  }
  group.id = "g";
  group.world_size = 2;
  group.table =
      std::make_shared<const TensorTable>(TensorTable{{"w", {scene.elements}, DType::kFloat32}});
  group.lost.resize(2);
  for (int rank = 0; rank < 2; ++rank) {
    group.ranks.push_back(MakeActor(rank, scene));
    actors.push_back(std::make_shared<FakeActor>());
  }
  for (int i = 0; i < scene.engines; ++i) {
    auto replica = std::make_shared<Replica>();
    replica->engine = fmt::format("e{}", i);
    replica->state = ReplicaState::kRegistered;
    replicas.push_back(std::move(replica));
    engine_members.push_back(static_cast<MemberId>(100 + i));
  }
}

const std::string& SyncFixture::EngineDevice(size_t engine) const {
  static const std::string host = kHostDevice;
  const auto& devices = scene_.engine_devices;
  return devices.empty() ? host : devices[std::min(engine, devices.size() - 1)];
}

uint32_t SyncFixture::NumStages(size_t engine) const {
  const auto& stages = scene_.stages;
  return stages.empty() ? 0 : stages[std::min(engine, stages.size() - 1)];
}

SyncReport SyncFixture::Sync(uint64_t version, uint32_t require, bool check_replicas) {
  SyncSession session(*this, mailbox, version);
  for (int rank = 0; rank < 2; ++rank) {
    SyncRequest request;
    request.version = version;
    request.require_replicas = require;
    request.check_replicas = check_replicas;
    request.member = group.ranks[static_cast<size_t>(rank)]->member;
    request.rank = rank;
    request.port = actors[static_cast<size_t>(rank)];
    (void)session.AddRequest(std::move(request));
  }
  return session.Run();
}

void SyncFixture::StepDone(const std::string& device, const StepCommand& command) {
  constexpr uint64_t kWord = 42;
  const std::set<std::string> writers(scene_.actor_devices.begin(), scene_.actor_devices.end());
  const uint64_t supplied = writers.contains(device) ? kWord / writers.size() : 0;
  StepDone(device, command, command.step == Step::kTransfer ? supplied : kWord);
}

void SyncFixture::Landed(const std::string& device, const StepCommand& command, uint32_t writes) {
  mailbox.Post({.kind = Event::Kind::kLanded,
                .device = device,
                .attempt = command.attempt,
                .round = command.round,
                .target = command.targets.front(),
                .writes = writes});
}

void SyncFixture::LoseWorker(const std::string& device) {
  mailbox.Post({.kind = Event::Kind::kWorkerLost,
                .device = device,
                .status = WithPeer(Error(StatusCode::kUnavailable, reason::kWorkerLost, "",
                                         "the worker died: device={}", device),
                                   "worker " + device)});
}

void SyncFixture::StepDone(const std::string& device, const StepCommand& command, uint64_t word,
                           const Status& status) {
  Event event;
  event.device = device;
  event.kind = Event::Kind::kStepDone;
  event.attempt = command.attempt;
  event.step = command.step;
  event.status = status;
  event.touched = true;
  event.digests = {{.target = 0, .tensors = {0}, .words = {word, 0}}};
  mailbox.Post(std::move(event));
}

void SyncFixture::Lose(MemberId member, bool engine) {
  mailbox.Post({.kind = engine ? Event::Kind::kEngineLost : Event::Kind::kActorLost,
                .member = member,
                .status = WithPeer(Error(StatusCode::kUnavailable, reason::kPeerLost, "", "gone"),
                                   engine ? "engine" : "actor")});
}

std::vector<ReplicaView> SyncFixture::ViewReplicas() {
  std::vector<ReplicaView> views;
  for (size_t i = 0; i < replicas.size(); ++i) {
    ReplicaView view;
    view.handle = replicas[i];
    view.engine = replicas[i]->engine;
    view.state = replicas[i]->state;
    view.version = replicas[i]->version;
    auto rank = std::make_shared<EngineRank>();
    rank->member = engine_members[i];
    rank->label = "engine " + view.engine;
    rank->device = EngineDevice(i);
    rank->num_stages = NumStages(i);
    view.targets = {{rank, std::make_shared<FakeEngine>(*this, rank->member, rank->label)}};
    views.push_back(std::move(view));
  }
  return views;
}

std::shared_ptr<WorkerPort> SyncFixture::Worker(const std::string& device) {
  if (workers_down.contains(device)) return nullptr;
  std::shared_ptr<WorkerPort>& worker = workers_[device];
  if (worker == nullptr) worker = std::make_shared<FakeWorker>(*this, device);
  return worker;
}

void SyncFixture::WireReady(const std::string& device, uint64_t wire, const Status& status) {
  mailbox.Post({.kind = Event::Kind::kWireReady, .device = device, .status = status, .wire = wire});
}

void SyncFixture::CommitReplica(const ReplicaView& view, uint64_t version,
                                const std::string& layout, uint64_t digest) {
  ledger.Consume(version, layout, digest);
  view.handle->version = version;
  (void)view.handle->Apply(ReplicaEvent::kCommitted);
}

StatusOr<std::shared_ptr<const ReplicaPlan>> SyncFixture::PlanFor(const GroupView&,
                                                                  const ReplicaView& view) {
  std::shared_ptr<const ReplicaPlan>& cached = plans_[view.engine];
  if (cached != nullptr) return cached;
  auto layout = std::make_shared<RankLayout>();
  layout->params = {{"w", {scene_.elements}, DType::kFloat32}};
  const Box whole = WholeBox({scene_.elements});
  layout->writes = {{.source = whole, .target = whole}};
  const std::vector<RankShards> shards = {group.ranks[0]->shards, group.ranks[1]->shards};
  const RankLayout* const layouts[] = {layout.get()};
  WEIGHTD_ASSIGN_OR_RETURN(CompiledPlan compiled,
                           CompilePlan(*group.table, shards, layouts, {}, {}));
  auto resolved = std::make_shared<ResolvedReplica>();
  resolved->layout_key = "layout";
  resolved->layouts = {layout};
  resolved->num_tensors = {1};
  auto worker = std::make_shared<WorkerPlan>();
  worker->handle = plans_.size();
  worker->digest = compiled.digest;
  worker->source_devices = scene_.actor_devices;
  worker->target_devices = {view.targets.front().rank->device};
  auto plan = std::make_shared<ReplicaPlan>();
  for (const std::string& source : worker->source_devices) {
    const std::string& target = worker->target_devices.front();
    if (scene_.wire && source != target) worker->wire_pairs.emplace(source, target);
  }
  plan->shares =
      ShareWork(compiled, worker->source_devices, worker->target_devices, worker->wire_pairs);
  plan->resolved = std::move(resolved);
  plan->compiled = std::make_shared<const CompiledPlan>(std::move(compiled));
  plan->worker = std::move(worker);
  cached = std::move(plan);
  return cached;
}

}  // namespace weightd
