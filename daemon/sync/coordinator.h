// The coordinator: every model's registry, its queue of jobs (syncs and catch-ups, one at a time
// per model) and the routing of events to the job that waits for them. The server feeds it; it
// talks back through ports.
#pragma once

#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "daemon/sync/catch_up.h"
#include "daemon/sync/mailbox.h"
#include "daemon/sync/plan_cache.h"
#include "daemon/sync/spawned_workers.h"
#include "daemon/sync/sync_session.h"

namespace weightd {

/// What a trainer rank says first.
struct ActorIdentity {
  std::string model;
  std::string group;
  uint64_t group_order = 0;
  int rank = 0;
  int world_size = 0;
  std::string process;
  bool spawns_worker = false;
};

/// What an engine rank says first.
struct EngineIdentity {
  std::string model;
  std::string engine;
  EngineCoordinates coordinates;
  int num_ranks = 1;
  std::string process;
  uint64_t held_version = 0;
  bool dirty = false;
  bool spawns_worker = false;
};

struct ModelRoom;

/// One trainer rank's place in the registry; owned by its stream. Fields are the coordinator's.
struct ActorSession {
  ActorIdentity identity;
  std::shared_ptr<ActorPort> port;
  ModelRoom* room = nullptr;
  std::shared_ptr<ActorGroup> group;
  MemberId member = MemberId::kNone;
};

/// One engine rank's place in the registry; owned by its stream. Fields are the coordinator's.
struct EngineSession {
  EngineIdentity identity;
  std::shared_ptr<EnginePort> port;
  ModelRoom* room = nullptr;
  std::shared_ptr<Replica> replica;
  MemberId member = MemberId::kNone;
};

/// What weightctl shows of a running sync.
struct SyncView {
  bool running = false;
  uint64_t version = 0;
  SyncProgress progress;
  uint64_t elapsed_us = 0;
  double bytes_per_second = 0;
  PhaseTimes phases;
  std::string waiting_for;
};

/// What weightctl shows of one model.
struct ModelView {
  std::string name;
  uint64_t highest_version = 0;
  std::optional<GroupView> group;
  std::vector<Replica> replicas;
  SyncView sync;
  std::vector<SyncReport> history;  ///< latest first
};

/// The plan that weightctl shows.
struct PlanView {
  GroupView group;
  std::vector<ReplicaView> replicas;
  std::vector<std::shared_ptr<const ReplicaPlan>> plans;
  double bytes_per_second = 0;  ///< of the last sync; 0 if there was none
};

/// Thread safety: every method from any thread; none blocks except Drain and the destructor.
class Coordinator {
 public:
  struct Config {
    SyncOptions sync;
    uint64_t epoch = 0;
    uint64_t max_tensors = 1'000'000;
    uint64_t max_sessions = 4096;
    std::vector<std::string> devices = {kHostDevice};  ///< that the daemon's own workers serve
    WorkerSettings worker;                             ///< of those that clients start
  };
  Coordinator(Config config, std::shared_ptr<const LoaderRegistry> loaders, VersionStore& store,
              SyncObserver& observer);
  /// Ends running jobs (their attempts fail with CANCELLED) and joins the threads.
  ~Coordinator();

  // ---- trainer ranks
  /// \error DUPLICATE_RANK, WORLD_SIZE, FENCED (see Model::JoinGroup), UNAVAILABLE DRAINING,
  /// RESOURCE_EXHAUSTED TOO_MANY_SESSIONS
  StatusOr<std::shared_ptr<ActorSession>> JoinActor(const ActorIdentity& identity,
                                                    std::shared_ptr<ActorPort> port);
  /// Must the rank send its table? False if the group has one with this digest.
  bool WantsTable(const ActorSession& session, const std::string& digest);
  /// A client describes this many tensors or parameters, so far.
  /// \error RESOURCE_EXHAUSTED MESSAGE_TOO_LARGE
  Status CheckCount(size_t count) const;
  /// \error INVALID_ARGUMENT DUPLICATE_TENSOR, TABLE_MISMATCH naming the first difference,
  /// RESOURCE_EXHAUSTED
  /// INVALID_ARGUMENT UNKNOWN_DEVICE listing the devices that are served
  StatusOr<WorkerEndpoint> RegisterActor(ActorSession& session, const std::string& device,
                                         const std::string& digest,
                                         std::optional<TensorTable> table, RankShards shards);
  void RequestSync(ActorSession& session, SyncRequest request);
  void CancelSync(ActorSession& session);
  void LeaveActor(ActorSession& session, const Status& cause);

  // ---- engine ranks
  /// \error DUPLICATE_RANK, UNAVAILABLE DRAINING, RESOURCE_EXHAUSTED TOO_MANY_SESSIONS
  StatusOr<std::shared_ptr<EngineSession>> JoinEngine(const EngineIdentity& identity,
                                                      std::shared_ptr<EnginePort> port);
  /// The endpoint of the rank's own device first, then those of devices that write into it. `trace`
  /// may be null. A rule file that describes the model wins over it unless `prefer_trace`.
  /// \error UNKNOWN_ARCHITECTURE, UNKNOWN_PROFILE, UNKNOWN_DEVICE, CONFIG, DUPLICATE_TENSOR
  StatusOr<std::vector<WorkerEndpoint>> RegisterEngine(EngineSession& session,
                                                       const std::string& device, EngineModel model,
                                                       std::vector<ParamInfo> params,
                                                       std::shared_ptr<const TracedLayout> trace,
                                                       bool prefer_trace);
  void Quiesced(EngineSession& session, AttemptId attempt, const Status& status);
  void Converted(EngineSession& session, AttemptId attempt, uint32_t stage, const Status& status);
  void Committed(EngineSession& session, AttemptId attempt, const Status& status,
                 std::vector<std::string> caches_reset);
  /// OK as cause means an orderly leave.
  void LeaveEngine(EngineSession& session, const Status& cause);

  // ---- the workers, one per device
  void WorkerUp(std::shared_ptr<WorkerPort> worker, uint32_t pid = 0);
  void WorkerDown(const WorkerPort* worker, const Status& cause);
  void MemberAttached(const std::string& device, MemberId member, const Status& status);
  void MemberLost(const std::string& device, MemberId member, const std::string& cause);
  /// PlanLoaded, Progress and StepDone go to the job that waits for them.
  void WorkerEvent(const Event& event);
  void StagingUsed(const std::string& device, uint64_t bytes) {
    observer_.OnStaging(device, bytes);
  }

  /// The client that was asked to start this device's worker, if the token is the one it was given;
  /// else nullptr.
  std::shared_ptr<OwnerPort> WorkerOwner(const std::string& device, const std::string& token);
  /// The client's worker has ended; see SpawnedWorkers::Ended.
  void WorkerEnded(const OwnerPort* client, const std::string& device, const std::string& how,
                   bool given_up);

  // ---- views
  std::vector<ModelView> Views(const std::string& model_or_empty);
  /// Plans what is not planned yet. May take as long as a compilation.
  /// \error NOT_FOUND NO_PLAN, or what the loader or the planner refuses
  StatusOr<PlanView> Plan(const std::string& model);
  /// Is this replica (or are all of this engine's) SERVING? nullopt: unknown engine.
  std::optional<bool> EngineReady(const std::string& engine);
  /// Workers that clients have started.
  std::vector<SpawnedWorkers::View> SpawnedViews();
  /// Served devices whose worker is not attached; those that clients serve are not among them.
  std::vector<std::string> MissingWorkers();
  uint64_t epoch() const { return config_.epoch; }

  /// Refuses new sessions and syncs, waits until running jobs have ended or `limit` has passed.
  void Drain(milliseconds limit);

 private:
  friend class RoomHost;
  struct MemberInfo {
    std::string token;
    std::string label;
    bool writable = false;
    std::string device;              ///< of its memory
    std::set<std::string> lent;      ///< devices whose workers it lends its memory to
    std::set<std::string> attached;  ///< of these, whose workers have mapped it
    ModelRoom* room = nullptr;
    std::weak_ptr<ActorPort> actor;
    std::weak_ptr<EnginePort> engine;
  };
  struct Job {
    std::shared_ptr<Mailbox> mailbox;
    std::shared_ptr<class RoomHost> host;
    std::shared_ptr<SyncSession> sync;  // or
    std::shared_ptr<Replica> catch_up;  // or
    std::shared_ptr<Replica> retain;    // serves `version`, of which the worker keeps a copy
    uint64_t version = 0;
  };
  friend struct ModelRoom;

  ModelRoom& RoomFor(const std::string& model);
  Status CheckJoin() const;
  WorkerEndpoint AddMember(ModelRoom& room, const std::string& device, const std::string& label,
                           bool writable);
  Status CheckDevice(const std::string& device, const std::string& label, bool spawns) const;
  bool IsOwnDevice(const std::string& device) const;
  void OfferWorker(const std::shared_ptr<OwnerPort>& client, const std::string& label,
                   const std::string& process, const std::string& device);
  WorkerEndpoint Announce(MemberId member, MemberInfo& info, const std::string& device);
  void LendTo(MemberId member, MemberInfo& info, const std::string& device);
  bool StoresDirectly(const std::string& source, const std::string& target) const;
  void LearnPeers(const WorkerPort& worker);
  void LendToTrainer(ModelRoom& room, const std::string& device);
  std::set<std::string> TrainerDevices(const ModelRoom& room) const;
  void RemoveMember(MemberId member);
  void LoseWorker(const std::string& device, const Status& cause);
  void Post(ModelRoom& room, const Event& event);
  template <typename Session>
  void PostFrom(const Session& session, Event event);
  void Enqueue(ModelRoom& room, Job job);
  void RunJobs(ModelRoom& room);
  void MaybeRetain(ModelRoom& room);
  void RunRetain(ModelRoom& room, const Job& job, std::unique_lock<std::mutex>& lock);
  void RunCatchUp(ModelRoom& room, const Job& job, std::unique_lock<std::mutex>& lock);
  std::optional<CatchUpSource> FindCatchUp(const ModelRoom& room, const ReplicaView& view) const;
  bool MaybeCatchUp(ModelRoom& room, const std::shared_ptr<Replica>& replica);
  static void TellIdle(const ModelRoom& room, const ReplicaView& view);
  void FinishSync(ModelRoom& room, const SyncReport& report);
  GroupView ViewOf(const ActorGroup& group) const;
  ReplicaView ViewOf(const std::shared_ptr<Replica>& replica) const;
  std::vector<ReplicaView> ViewsOf(const ModelRoom& room) const;
  void Observe(const ModelRoom& room, const Replica& replica);
  Status CheckTable(const ActorGroup& group, const std::string& digest,
                    const std::optional<TensorTable>& table, const std::string& label) const;

  const Config config_;
  const std::shared_ptr<const LoaderRegistry> loaders_;
  VersionStore& store_;
  SyncObserver& observer_;

  std::mutex mu_;
  std::condition_variable jobs_changed_;
  std::map<std::string, std::unique_ptr<ModelRoom>> rooms_;
  std::map<MemberId, MemberInfo> members_;
  std::map<MemberId, std::shared_ptr<EnginePort>> engine_ports_;
  std::map<std::string, std::shared_ptr<WorkerPort>> workers_;  // by device; only those attached
  SpawnedWorkers spawned_;
  uint64_t next_member_ = 1;
  uint64_t next_attempt_ = 1;
  uint64_t next_wire_ = 1;
  PathPolicy policy_;
  std::mutex issue_mutex_;  // see SessionHost; taken before mu_
  uint64_t sessions_ = 0;
  bool draining_ = false;
  bool stopping_ = false;
};

/// One model's registry, plans and jobs. All fields are guarded by the coordinator's mutex.
struct ModelRoom {
  ModelRoom(std::string name, uint64_t highest, std::shared_ptr<const LoaderRegistry> loaders,
            const SyncOptions& options, std::function<void(double)> on_compiled)
      : model(std::move(name), highest),
        plans(std::move(loaders), options.window, options.wire_bytes, std::move(on_compiled)) {}

  Model model;
  PlanCache plans;
  std::deque<Coordinator::Job> jobs;  // front: running if `running`
  bool running = false;
  SyncView live;
  Clock::time_point sync_start;
  Clock::time_point phase_start;
  std::deque<SyncReport> history;  // latest first
  double last_bytes_per_second = 0;
  uint64_t retained_version = 0;  // of the host copy that workers keep; 0 = none
  std::string retained_layout;
  std::vector<std::string> retained_devices;  // whose workers keep it, per rank
  std::jthread thread;                        // last: joined before the rest goes
};

}  // namespace weightd
