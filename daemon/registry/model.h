// What the daemon knows about one model: its trainer groups, its engine replicas and its versions.
// State only, no I/O.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/base/status.h"
#include "daemon/layout/tensor_layout.h"
#include "daemon/layout/traced_layout.h"
#include "daemon/registry/replica_state.h"
#include "daemon/registry/version_ledger.h"

namespace weightd {

/// One registered trainer rank. Immutable; a new registration makes a new object with a new member.
struct ActorRank {
  MemberId member = MemberId::kNone;
  int rank = 0;
  std::string label;    ///< "actor 3"
  std::string process;  ///< "pid 71 on host a"
  std::string device;   ///< of its memory
  RankShards shards;
};

/// One start of a trainer.
struct ActorGroup {
  std::string id;
  uint64_t order =
      0;  ///< creation time in microseconds; newer groups supersede older ones once complete
  int world_size = 0;
  std::string table_digest;
  std::shared_ptr<const TensorTable> table;
  std::vector<std::shared_ptr<const ActorRank>> ranks;  ///< nullptr: not registered
  std::vector<bool> joined;  ///< a live session has said hello for this rank
  std::vector<bool> lost;    ///< was registered and died
  uint64_t generation = 0;   ///< another one after every registration and loss, never reused
  bool superseded = false;

  int registered() const;
  bool complete() const { return registered() == world_size; }
};

/// One registered engine rank. Immutable, as ActorRank.
struct EngineRank {
  MemberId member = MemberId::kNone;
  EngineCoordinates coordinates;
  std::string label;  ///< "engine e0 tp 1"
  std::string process;
  std::string device;  ///< of its memory
  std::vector<ParamInfo> params;
  uint32_t num_stages = 0;                     ///< of `params`; see daemon/layout/stages.h
  uint64_t staged_bytes = 0;                   ///< of the largest of them
  std::shared_ptr<const TracedLayout> traced;  ///< set: takes the place of a rule file
  uint64_t held_version = 0;
  bool dirty = false;
};

/// What all ranks of an engine say about the model.
struct EngineModel {
  std::string architecture;
  std::string profile;
  std::string config_json;
  std::string commit_mode;
  int num_ranks = 1;
  bool traced = false;  ///< every rank registered a trace, which describes the layout
};

/// All ranks of one engine instance with one dp rank: the unit of commit.
struct Replica {
  std::string engine;
  int dp_rank = 0;
  EngineModel model;
  std::map<std::pair<int, int>, std::shared_ptr<const EngineRank>> ranks;  ///< by (pp, tp)
  std::map<std::pair<int, int>, bool> joined;  ///< coordinates with a live session
  ReplicaState state = ReplicaState::kGone;
  ReplicaState before = ReplicaState::kGone;  ///< when the running attempt began
  uint64_t version = 0;                       ///< 0: none
  Status error;                               ///< why it is not ready, if something went wrong
  std::string loader;                         ///< what describes it, once known
  uint64_t generation = 0;                    ///< as of a group

  bool complete() const { return static_cast<int>(ranks.size()) == model.num_ranks; }
  std::string label() const { return fmt::format("engine {} dp {}", engine, dp_rank); }
  /// Applies the state table; logs nothing. \error INTERNAL for a transition that does not exist
  Status Apply(ReplicaEvent event);
};

/// Everything keyed by one model name.
/// Thread safety: none; the coordinator locks.
class Model {
 public:
  explicit Model(std::string name, uint64_t highest) : name_(std::move(name)), ledger_(highest) {}

  /// A trainer rank says hello. The returned group lives until its last rank has left.
  /// \error ABORTED FENCED if a newer complete group exists
  /// \error INVALID_ARGUMENT WORLD_SIZE if the group was opened with another size or rank is not
  /// below it \error ALREADY_EXISTS DUPLICATE_RANK if a live session has this rank
  StatusOr<std::shared_ptr<ActorGroup>> JoinGroup(const std::string& id, uint64_t order,
                                                  int world_size, int rank);

  /// Stores a registration. When it completes the group, older groups are superseded.
  void SetActor(ActorGroup& group, std::shared_ptr<const ActorRank> rank);

  /// The rank's session has ended.
  void LeaveGroup(const std::shared_ptr<ActorGroup>& group, int rank);

  /// An engine rank says hello.
  /// \error ALREADY_EXISTS DUPLICATE_RANK if a live session has these coordinates
  StatusOr<std::shared_ptr<Replica>> JoinReplica(const std::string& engine,
                                                 const EngineCoordinates& coordinates,
                                                 int num_ranks);

  /// Stores a registration; when it completes the replica, its state follows from what the ranks
  /// hold. \error INVALID_ARGUMENT CONFIG if the ranks of one replica disagree on architecture,
  /// profile, number of ranks, or on whether they are traced
  Status SetEngine(Replica& replica, const EngineModel& model,
                   std::shared_ptr<const EngineRank> rank);

  /// The rank's session has ended. An orderly leave of the last rank removes the replica.
  void LeaveReplica(const std::shared_ptr<Replica>& replica, std::pair<int, int> coordinates,
                    const Status& cause);

  const std::string& name() const { return name_; }
  VersionLedger& ledger() { return ledger_; }
  const VersionLedger& ledger() const { return ledger_; }
  const std::vector<std::shared_ptr<Replica>>& replicas() const { return replicas_; }
  const std::vector<std::shared_ptr<ActorGroup>>& groups() const { return groups_; }
  /// The newest group that is not superseded, complete ones first; nullptr if there is none.
  std::shared_ptr<ActorGroup> CurrentGroup() const;

 private:
  void Settle(Replica& replica);
  /// Shared by all groups and replicas: one that leaves and comes back as a new object must not
  /// look as it did before, since plans are kept under (name, generation).
  uint64_t NextGeneration() { return ++last_generation_; }

  uint64_t last_generation_ = 0;
  std::string name_;
  VersionLedger ledger_;
  std::vector<std::shared_ptr<ActorGroup>> groups_;
  std::vector<std::shared_ptr<Replica>> replicas_;
};

}  // namespace weightd
