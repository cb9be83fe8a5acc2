#include "tests/unit/sync/sync_fixture.h"

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
  void SendCommit(AttemptId attempt, uint64_t) override {
    if (fixture_.script.on_commit) return fixture_.script.on_commit(member_, attempt);
    fixture_.mailbox.Post({.kind = Event::Kind::kCommitted, .member = member_, .attempt = attempt});
  }
  void SendOutcome(AttemptId, const ReplicaOutcome& outcome, bool untouched) override {
    fixture_.outcomes.push_back(name_ + (outcome.committed ? ": committed"
                                         : untouched       ? ": untouched"
                                                     : ": " + std::string(Name(outcome.state))));
  }
  void SendWorkerChanged(const WorkerEndpoint&) override {}

 private:
  SyncFixture& fixture_;
  const MemberId member_;
  const std::string name_;
};

class FakeWorker : public WorkerPort {
 public:
  explicit FakeWorker(SyncFixture& fixture) : fixture_(fixture) {}
  std::string device() const override { return "host"; }
  std::string socket_path() const override { return "none"; }
  void SendExpect(MemberId, const std::string&, bool, const std::string&) override {}
  void SendForget(MemberId) override {}
  void SendPlan(const WorkerPlan& plan) override {
    fixture_.worker_log.emplace_back("plan");
    if (fixture_.script.on_plan) return fixture_.script.on_plan(plan);
    fixture_.mailbox.Post(
        {.kind = Event::Kind::kPlanLoaded, .plan = plan.handle, .digest = plan.digest});
  }
  void SendDropPlan(uint64_t) override {}
  void SendStep(const StepCommand& command) override {
    fixture_.worker_log.emplace_back(command.step == Step::kTransfer ? "transfer" : "verify");
    if (fixture_.script.on_step) return fixture_.script.on_step(command);
    fixture_.StepDone(command, 42);
  }
  void SendCancel(AttemptId) override { fixture_.worker_log.emplace_back("cancel"); }
  void Kill(const std::string&) override {
    fixture_.worker_killed = true;
    fixture_.mailbox.Post(
        {.kind = Event::Kind::kWorkerLost,
         .status = Error(StatusCode::kUnavailable, reason::kWorkerLost, "", "killed")});
  }

 private:
  SyncFixture& fixture_;
};

std::shared_ptr<const ActorRank> MakeActor(int rank) {
  auto actor = std::make_shared<ActorRank>();
  actor->member = static_cast<MemberId>(rank + 1);
  actor->rank = rank;
  actor->label = fmt::format("actor {}", rank);
  actor->shards.boxes = {{{2 * rank}, {2}}};
  actor->shards.first = {0, 1};
  actor->shards.box_index = {0};
  return actor;
}

}  // namespace

SyncFixture::SyncFixture(int engines) {
  for (milliseconds* limit : {&sync_options.admit, &sync_options.prepare, &sync_options.transfer,
                              &sync_options.verify, &sync_options.commit}) {
    *limit = milliseconds(300);
  }
  group.id = "g";
  group.world_size = 2;
  group.table = std::make_shared<const TensorTable>(TensorTable{{"w", {4}, DType::kFloat32}});
  group.lost.resize(2);
  for (int rank = 0; rank < 2; ++rank) {
    group.ranks.push_back(MakeActor(rank));
    actors.push_back(std::make_shared<FakeActor>());
  }
  for (int i = 0; i < engines; ++i) {
    auto replica = std::make_shared<Replica>();
    replica->engine = fmt::format("e{}", i);
    replica->state = ReplicaState::kRegistered;
    replicas.push_back(std::move(replica));
    engine_members.push_back(static_cast<MemberId>(100 + i));
  }
  worker_ = std::make_shared<FakeWorker>(*this);
}

SyncReport SyncFixture::Sync(uint64_t version, uint32_t require) {
  SyncSession session(*this, mailbox, version);
  for (int rank = 0; rank < 2; ++rank) {
    SyncRequest request;
    request.version = version;
    request.require_replicas = require;
    request.member = group.ranks[static_cast<size_t>(rank)]->member;
    request.rank = rank;
    request.port = actors[static_cast<size_t>(rank)];
    (void)session.AddRequest(std::move(request));
  }
  return session.Run();
}

void SyncFixture::StepDone(const StepCommand& command, uint64_t word, const Status& status) {
  Event event;
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
    view.targets = {{rank, std::make_shared<FakeEngine>(*this, rank->member, rank->label)}};
    views.push_back(std::move(view));
  }
  return views;
}

std::shared_ptr<WorkerPort> SyncFixture::Worker() { return worker_alive ? worker_ : nullptr; }

void SyncFixture::CommitReplica(const ReplicaView& view, uint64_t version,
                                const std::string& layout, uint64_t digest) {
  ledger.Consume(version, layout, digest);
  view.handle->version = version;
  (void)view.handle->Apply(ReplicaEvent::kCommitted);
}

StatusOr<std::shared_ptr<const ReplicaPlan>> SyncFixture::PlanFor(const GroupView&,
                                                                  const ReplicaView&) {
  if (plan_ != nullptr) return plan_;
  auto layout = std::make_shared<RankLayout>();
  layout->params = {{"w", {4}, DType::kFloat32}};
  layout->writes = {{.source = WholeBox({4}), .target = WholeBox({4})}};
  const std::vector<RankShards> shards = {group.ranks[0]->shards, group.ranks[1]->shards};
  const RankLayout* const layouts[] = {layout.get()};
  WEIGHTD_ASSIGN_OR_RETURN(CompiledPlan compiled,
                           CompilePlan(*group.table, shards, layouts, {}, {}));
  auto resolved = std::make_shared<ResolvedReplica>();
  resolved->layout_key = "layout";
  resolved->layouts = {layout};
  resolved->num_tensors = {1};
  auto worker = std::make_shared<WorkerPlan>();
  worker->handle = 1;
  worker->digest = compiled.digest;
  auto plan = std::make_shared<ReplicaPlan>();
  plan->resolved = std::move(resolved);
  plan->compiled = std::make_shared<const CompiledPlan>(std::move(compiled));
  plan->worker = std::move(worker);
  plan_ = std::move(plan);
  return plan_;
}

}  // namespace weightd
