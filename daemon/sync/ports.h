// What the sync core needs from the outside: the actors, engines and workers it talks to, and what
// it is told by them. The server implements the ports; tests implement them in memory.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/base/ids.h"
#include "daemon/base/status.h"
#include "daemon/layout/tensor_layout.h"
#include "daemon/plan/transfer_plan.h"
#include "daemon/plan/wire_schedule.h"
#include "daemon/registry/replica_state.h"
#include "daemon/sync/phase.h"

namespace weightd {

/// How a client reaches a worker; see weightd.v1.WorkerEndpoint.
struct WorkerEndpoint {
  std::string socket_path;  ///< empty while the worker is not running
  std::string token;
  MemberId member = MemberId::kNone;
  std::string device;
};

/// What a sync did to one replica.
struct ReplicaOutcome {
  std::string engine;
  int dp_rank = 0;
  bool committed = false;
  uint64_t version = 0;
  ReplicaState state = ReplicaState::kGone;
  Status error;
  std::string verified;  ///< "memory" or "loadable"; empty when not verified
  std::vector<std::string> caches_reset;
};

/// The end of a sync.
struct SyncReport {
  uint64_t version = 0;
  AttemptId attempt;
  Status error;
  std::vector<ReplicaOutcome> replicas;
  PhaseTimes phases;
  uint64_t bytes = 0;                          ///< landed, all replicas
  std::map<std::string, uint64_t> path_bytes;  ///< the same by path, zero fill left out
  uint64_t pause_us = 0;  ///< longest time that a replica held still for; 0 if none did
};

struct SyncProgress {
  Phase phase = Phase::kNone;
  AttemptId attempt;
  uint64_t bytes_done = 0;
  uint64_t bytes_total = 0;
};

/// What the configuration says about any worker; see weightd.v1.WorkerSettings.
struct WorkerSettings {
  milliseconds attach_within{30'000};  ///< from the order to the worker's hello
  uint64_t threads = 0;
  bool peer_check = true;
  milliseconds register_within{10'000};
  milliseconds restart_backoff{100};
  std::string log_level = "info";
  std::string log_format = "text";
};

/// See weightd.v1.StartWorker.
struct WorkerOrder {
  std::string device;
  std::string token;
  WorkerSettings settings;
};

/// A client that may start the worker of its device. All calls return at once; any thread.
class OwnerPort {
 public:
  virtual ~OwnerPort() = default;
  virtual void SendStartWorker(const WorkerOrder& order) = 0;
  /// The client kills its worker; `again`: and starts it again.
  virtual void SendStopWorker(const std::string& device, bool again, const std::string& why) = 0;
};

/// A trainer rank's session. All calls return at once; any thread.
class ActorPort : public OwnerPort {
 public:
  virtual void SendProgress(uint64_t request, const SyncProgress& progress) = 0;
  virtual void SendReport(uint64_t request, const SyncReport& report) = 0;
  virtual void SendWorkerChanged(const WorkerEndpoint& endpoint) = 0;
};

/// An engine rank's session. All calls return at once; any thread.
class EnginePort : public OwnerPort {
 public:
  virtual void SendPrepare(AttemptId attempt, uint64_t version, bool catch_up) = 0;
  virtual void SendConvert(AttemptId attempt, uint32_t stage) = 0;
  virtual void SendCommit(AttemptId attempt, uint64_t version) = 0;
  virtual void SendOutcome(AttemptId attempt, const ReplicaOutcome& outcome, bool untouched) = 0;
  /// No attempt is coming; see weightd.v1.EngineIdle.
  virtual void SendIdle(uint64_t version, const Status& why) = 0;
  virtual void SendWorkerChanged(const WorkerEndpoint& endpoint) = 0;
};

/// A plan as a worker needs it: everything but addresses.
struct WorkerPlan {
  uint64_t handle = 0;
  std::shared_ptr<const TensorTable> table;
  std::vector<std::shared_ptr<const RankShards>> shards;   ///< per actor rank
  std::vector<MemberId> sources;                           ///< per actor rank
  std::vector<std::string> source_devices;                 ///< per actor rank
  std::vector<std::shared_ptr<const RankLayout>> layouts;  ///< per engine rank
  std::vector<MemberId> targets;                           ///< per engine rank
  std::vector<std::string> labels;                         ///< per engine rank
  std::vector<std::string> target_devices;                 ///< per engine rank
  WindowLimits limits;
  WirePairs wire_pairs;     ///< whose bytes go over a wire
  uint64_t wire_bytes = 0;  ///< staging of one device for it
  Digest128 digest{};
};

/// Values equal weightd.v1.Step.
enum class Step {
  kTransfer = 1,
  kVerify = 2,
  kCheckReplicas = 3,
  kCopyPeer = 4,
  kRetain = 5,
  kRestore = 6,
};

struct StepCommand {
  AttemptId attempt;
  Step step = Step::kTransfer;
  uint64_t plan = 0;
  std::vector<uint32_t> targets;
  std::vector<MemberId> peers;
  uint64_t version = 0;
  milliseconds deadline{0};
  uint32_t round = 0;             ///< of Transfer and Verify
  uint64_t wire = 0;              ///< of a transfer; 0: none
  milliseconds turn_deadline{0};  ///< of a transfer over a wire
  bool follows = false;           ///< a verification that runs beside its transfer
};

/// See weightd.v1.Landed.
struct LandedMark {
  AttemptId attempt;
  uint32_t round = 0;
  uint32_t target = 0;
  uint32_t writes = 0;
};
/// All writes have landed.
inline constexpr uint32_t kAllWrites = UINT32_MAX;

/// How a worker joins a wire; see weightd.v1.OpenWire.
struct WireOffer {
  uint64_t wire = 0;
  uint64_t plan = 0;
  std::string id;
  milliseconds deadline{0};
};

/// What a worker says of its device.
struct WorkerFacts {
  uint32_t nccl_version = 0;    ///< 0: it has no NCCL
  std::string nccl_problem;     ///< why
  std::set<std::string> peers;  ///< GPUs whose memory its GPU can access
  bool follows = false;         ///< it can verify beside a transfer, and says what has landed
};

/// A worker process, one per device. All calls return at once; any thread.
class WorkerPort {
 public:
  virtual ~WorkerPort() = default;
  virtual std::string device() const = 0;
  virtual std::string socket_path() const = 0;
  virtual WorkerFacts facts() const { return {}; }
  virtual void SendExpect(MemberId member, const std::string& token, bool writable,
                          const std::string& label) = 0;
  virtual void SendForget(MemberId member) = 0;
  virtual void SendPlan(const WorkerPlan& plan) = 0;
  virtual void SendDropPlan(uint64_t handle) = 0;
  virtual void SendStep(const StepCommand& command) = 0;
  virtual void SendCancel(AttemptId attempt) = 0;
  virtual void SendLanded(const LandedMark& mark) = 0;
  virtual void SendMakeWireId(uint64_t wire) = 0;
  virtual void SendOpenWire(const WireOffer& offer) = 0;
  virtual void SendCloseWire(uint64_t wire) = 0;
  /// Kills the process: the fence of last resort. Its loss is then reported as any other.
  virtual void Kill(const std::string& why) = 0;
};

/// Digest words of one engine rank; see weightd.v1.TargetDigests.
struct TargetDigests {
  uint32_t target = 0;
  std::vector<uint32_t> tensors;
  std::vector<uint64_t> words;
};

/// What metrics want to know. Called from sync threads; must not block.
class SyncObserver {
 public:
  virtual ~SyncObserver() = default;
  virtual void OnSyncEnd(const std::string& model, const SyncReport& report) = 0;
  virtual void OnReplica(const std::string& model, const std::string& engine, int dp_rank,
                         ReplicaState state, uint64_t version) = 0;
  /// A replica has left in order and will not come back under this registration.
  virtual void OnReplicaLeft(const std::string& model, const std::string& engine, int dp_rank) = 0;
  virtual void OnPlanCompiled(double seconds) = 0;
  /// A worker that a client started has died; its owner starts it again.
  virtual void OnWorkerRestart(const std::string& device) = 0;
  /// Bytes of a worker's staging that hold pages.
  virtual void OnStaging(const std::string& device, uint64_t bytes) = 0;
};

/// Keeps what must survive the daemon: epoch and highest version per model.
class VersionStore {
 public:
  virtual ~VersionStore() = default;
  virtual uint64_t Highest(const std::string& model) const = 0;
  /// Durable when it returns OK. \error INTERNAL with the path
  virtual Status Save(const std::string& model, uint64_t highest) = 0;
};

/// kAuto: beside the transfer on GPUs, if a round has enough bytes to be worth its messages. On a
/// host the cores that would verify are those that copy.
enum class VerifyWhen { kAuto, kBeside, kAfter };

/// The limits and deadlines of a sync.
struct SyncOptions {
  milliseconds admit{15000};
  milliseconds prepare{15000};
  milliseconds transfer{15000};  ///< without progress
  milliseconds verify{15000};
  milliseconds commit{15000};
  WindowLimits window;
  bool retain_on_host = false;
  bool catch_up = true;
  bool always_wire = false;          ///< see PathPolicy
  uint64_t wire_bytes = 192u << 20;  ///< staging of one device
  VerifyWhen verify_when = VerifyWhen::kAuto;
};

}  // namespace weightd
