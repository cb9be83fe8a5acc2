// The session of a trainer rank: registration and syncs.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "client/include/weightd/weightd.h"
#include "client/src/cuda_fence.h"
#include "client/src/registration.h"
#include "client/src/session.h"
#include "client/src/staged_memory.h"
#include "daemon/base/status.h"
#include "weightd/v1/actor.grpc.pb.h"

namespace weightd {

struct ActorProtocol {
  using Service = v1::ActorService;
  using Request = v1::ActorRequest;
  using Event = v1::ActorEvent;
};

/// How a sync ended.
struct SyncOutcome {
  Status status;
  std::string result_json;  ///< empty if the daemon did not answer
};

/// Thread safety: Cancel and StateJson by any thread, the others by one thread at a time.
class ActorClient final : public Session<ActorProtocol> {
 public:
  struct Identity {
    std::string model;
    std::string group;
    uint64_t group_order = 0;
    uint32_t rank = 0;
    uint32_t world_size = 1;
    std::string device;  ///< of the memory; empty = "host"
  };

  ActorClient(SessionSettings settings, Identity identity);

  Status Register(std::span<const weightd_tensor> tensors);

  /// Starts a sync; does not block. \error FAILED_PRECONDITION if nothing is registered or a sync
  /// runs, INVALID_ARGUMENT for a staged shard that was not registered
  Status SyncBegin(const weightd_sync_options& options);
  /// nullopt: it still runs. A negative timeout waits without limit.
  std::optional<SyncOutcome> SyncWait(int timeout_ms);
  void Cancel();
  std::string StateJson() const;

 private:
  struct Running {
    v1::ActorSync message;
    bool sent = false;
    Clock::time_point send_by;
  };
  enum class SyncState { kIdle, kRunning, kEnded };

  Request Hello() override;
  std::vector<Request> Registration() override;
  std::shared_ptr<const MemoryOffer> Offer() override;
  void HandleEvent(const v1::ActorEvent& event) override;
  void HandleError(const Status& error) override;
  void HandleLost(const Status& cause) override;
  void HandleRegistered() override {}
  Clock::time_point HandleTime() override;

  Status PrepareFence(ActorRegistration* registration);
  void SendTable();
  void StartSync(v1::ActorSync message, const std::vector<StagedShard>& staged);
  void EndSync(Status status, std::string result_json);
  std::string rank_label() const;

  const Identity identity_;
  CudaFence fence_;  // the caller's own: set by Register, recorded by SyncBegin

  // The session thread's own.
  std::optional<Running> sync_;
  std::shared_ptr<StagedMemory> staged_;  // shared with the link that fills the ring

  // Guarded by mutex_, as the view is. The session thread alone changes registration_ and reads it
  // without the lock.
  std::shared_ptr<const ActorRegistration> registration_;  // shared with offers
  SyncState sync_state_ = SyncState::kIdle;
  SyncOutcome outcome_;
  std::string phase_;
  uint64_t bytes_done_ = 0;
  uint64_t bytes_total_ = 0;
  uint64_t next_request_ = 1;
};

}  // namespace weightd
