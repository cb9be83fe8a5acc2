// Who takes part in one sync, as frozen at its admission, and the hooks by which a session reads
// and changes the coordinator's state.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "daemon/layout/loader.h"
#include "daemon/layout/stages.h"
#include "daemon/plan/data_path.h"
#include "daemon/plan/plan_compiler.h"
#include "daemon/registry/model.h"
#include "daemon/sync/ports.h"

namespace weightd {

/// One rank's call of sync().
struct SyncRequest {
  uint64_t version = 0;
  uint64_t request = 0;           ///< the client's own number, echoed
  uint32_t require_replicas = 0;  ///< 0: all
  bool check_replicas = false;
  Status refused;  ///< this rank found its own memory moved or freed
  MemberId member = MemberId::kNone;
  int rank = 0;
  std::shared_ptr<ActorPort> port;
};

/// The trainer group of a sync.
struct GroupView {
  std::string id;
  uint64_t generation = 0;
  int world_size = 0;
  std::shared_ptr<const TensorTable> table;
  std::vector<std::shared_ptr<const ActorRank>> ranks;  ///< nullptr where none is registered
  std::vector<bool> lost;
  bool superseded = false;
  bool complete() const;
};

/// One rank of a replica.
struct TargetView {
  std::shared_ptr<const EngineRank> rank;
  std::shared_ptr<EnginePort> port;
  uint32_t num_rounds() const { return NumRounds(rank->num_stages); }
};

/// One replica of a sync. `handle` is the coordinator's own object, only passed back to it.
struct ReplicaView {
  std::shared_ptr<Replica> handle;
  std::string engine;
  int dp_rank = 0;
  uint64_t generation = 0;
  EngineModel model;
  ReplicaState state = ReplicaState::kGone;
  uint64_t version = 0;
  std::vector<TargetView> targets;  ///< in (pp, tp) order
  std::string label() const { return fmt::format("engine {} dp {}", engine, dp_rank); }
  /// Rounds of the rank that has most; see daemon/layout/stages.h.
  uint32_t num_rounds() const;
  /// Whether its lent memory holds the whole model, so that it can be copied to another replica or
  /// from one. \error FAILED_PRECONDITION STAGED if stages share it
  Status CheckCopyable() const;
  /// What a digest of its lent memory vouches for: "memory", or "loadable" if the engine converts
  /// some of it.
  const char* verified() const;
};

/// The loader of one replica, evaluated for every rank.
struct ResolvedReplica {
  std::string loader;      ///< origin of the rule file, or kTracedOrigin
  std::string layout_key;  ///< equal for replicas with equal layouts, whose digests are comparable
  std::vector<std::shared_ptr<const RankLayout>> layouts;  ///< in (pp, tp) order
  std::vector<size_t> num_tensors;  ///< per layout: source tensors that it reads
  std::vector<uint32_t> skipped;    ///< source tensors that a rule skips
};

/// What it takes to sync one group into one replica; cached, replayed at every sync.
struct ReplicaPlan {
  std::shared_ptr<const ResolvedReplica> resolved;
  std::shared_ptr<const CompiledPlan> compiled;
  std::shared_ptr<const WorkerPlan> worker;
  std::vector<WorkerShare> shares;  ///< of all devices that the plan touches
  std::map<std::pair<std::string, std::string>, PathChoice> paths;  ///< (source, target device)
  std::map<std::pair<std::string, std::string>, PathChoice> pulls;  ///< likewise, if any is pulled
  std::map<std::string, uint64_t> path_bytes;                       ///< landed, by name of the path

  /// Does the worker of this device take part?
  bool Uses(const std::string& device) const;
};

/// How a session reads and changes the coordinator's state. Each call takes the coordinator's lock;
/// none waits.
class SessionHost {
 public:
  virtual ~SessionHost() = default;
  virtual GroupView ViewGroup() = 0;
  /// Replicas that are complete, in the order of registration.
  virtual std::vector<ReplicaView> ViewReplicas() = 0;
  /// A registered replica that waits for ranks, e.g. "engine e0 dp 0"; "" if there is none.
  virtual std::string IncompleteReplica() { return ""; }
  virtual AttemptId NextAttempt() = 0;
  /// nullptr while the worker of this device is not running.
  virtual std::shared_ptr<WorkerPort> Worker(const std::string& device) = 0;
  virtual Status AdmitVersion(uint64_t version) = 0;
  virtual Status CheckRetry(uint64_t version, const std::string& layout, uint64_t digest) = 0;
  /// Applies the state table to the replica unless it has changed since the view (then GONE wins
  /// and nothing happens).
  virtual void ApplyReplica(const ReplicaView& view, ReplicaEvent event, const Status& error) = 0;
  /// The replica serves `version` now: ledger, replica version, state.
  virtual void CommitReplica(const ReplicaView& view, uint64_t version, const std::string& layout,
                             uint64_t digest) = 0;
  /// The replica has caught up with `version`, which the ledger knows already.
  virtual void CommitCatchUp(const ReplicaView& view, uint64_t version) = 0;
  virtual ReplicaState StateOf(const ReplicaView& view) = 0;
  /// From the cache, or evaluated now. \error everything a loader refuses
  virtual Status ResolveLayouts(const GroupView& group, const ReplicaView& replica) = 0;
  /// From the cache, or compiled now. \pre ResolveLayouts(group, replica).ok() \error everything
  /// the planner refuses
  virtual StatusOr<std::shared_ptr<const ReplicaPlan>> PlanFor(const GroupView& group,
                                                               const ReplicaView& replica) = 0;
  /// True once the worker of `device` has mapped the member's memory. A client that has not been
  /// told to lend it there is told now.
  virtual bool Attached(MemberId member, const std::string& device) = 0;
  /// True if the device's current worker has confirmed this plan already; otherwise the session
  /// must send it.
  virtual bool PlanLoaded(uint64_t handle, const std::string& device) = 0;
  virtual void MarkPlanLoaded(uint64_t handle, const std::string& device) = 0;
  /// The wire of a plan that all its workers have open; 0: none.
  virtual uint64_t FindWire(uint64_t plan) = 0;
  /// A number for one more wire; never used again.
  virtual uint64_t NextWire() = 0;
  virtual void KeepWire(uint64_t plan, uint64_t wire, const std::vector<std::string>& devices) = 0;
  virtual void DropWire(uint64_t plan) = 0;
  /// Held while something is sent that several workers do together: all of them then see what
  /// several sessions want in the same order, and none waits for another that waits for it.
  virtual std::mutex& issue_mutex() = 0;
  /// Makes `version` durable as possibly consumed; logs if that fails. May block on the disk;
  /// called beside the transfer, by another thread.
  virtual void ReserveVersion(uint64_t version) = 0;
  /// What weightctl shows.
  virtual void ShowProgress(const SyncProgress& progress, const std::string& waiting_for) = 0;
  virtual const SyncOptions& options() const = 0;
};

}  // namespace weightd
