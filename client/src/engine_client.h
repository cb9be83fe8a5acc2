// The session of one engine rank: it lends its parameters and answers the daemon's attempts.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "client/include/weightd/weightd.h"
#include "client/src/engine_truth.h"
#include "client/src/registration.h"
#include "client/src/session.h"
#include "daemon/base/status.h"
#include "weightd/v1/engine.grpc.pb.h"

namespace weightd {

struct EngineProtocol {
  using Service = v1::EngineService;
  using Request = v1::EngineRequest;
  using Event = v1::EngineEvent;
};

/// Thread safety: StateJson and Wait by any thread, the others by one thread at a time.
class EngineClient final : public Session<EngineProtocol> {
 public:
  struct Identity {
    std::string model;
    std::string engine;
    EngineCoordinates coordinates;
    std::string architecture;
    std::string profile;
    std::string config_json;
    std::string commit_mode;
    bool auto_quiesce = false;
    std::string device;  ///< of the memory; empty = "host"
  };

  EngineClient(SessionSettings settings, Identity identity);

  /// `trace` may be nullptr.
  Status Register(std::span<const weightd_param> params, const weightd_trace* trace);
  std::string StateJson() const;
  /// The number of changes so far, as soon as it differs from `since` or after the timeout.
  uint64_t Wait(uint64_t since, int timeout_ms);
  /// Answers the pending Prepare, conversion or Commit; a failed status is the engine's refusal.
  Status Quiesced(const Status& outcome);
  Status Converted(const Status& outcome);
  Status Committed(const Status& outcome, const std::vector<std::string>& caches_reset);

  std::string label() const;  ///< "engine e0 tp 1", for messages

 private:
  Request Hello() override;
  std::vector<Request> Registration() override;
  std::shared_ptr<const MemoryOffer> Offer() override;
  void HandleEvent(const v1::EngineEvent& event) override;
  void HandleError(const Status& error) override;
  void HandleLost(const Status& cause) override;
  void HandleRegistered() override {}
  void HandleClose() override;

  void OnPrepare(const v1::EnginePrepare& prepare);
  void OnConvert(const v1::EngineConvert& convert);
  void OnCommit(const v1::EngineCommit& commit);
  void SendQuiesced(const v1::AttemptId& attempt, const Status& outcome);
  void SendConverted(const v1::AttemptId& attempt, uint32_t stage, const Status& outcome);
  void SendCommitted(const v1::AttemptId& attempt, const Status& outcome,
                     const std::vector<std::string>& caches_reset);

  const Identity identity_;
  const std::string incarnation_;
  std::shared_ptr<const EngineRegistration> registration_;  // session thread; shared with offers
  EngineTruth truth_;                                       // guarded by mutex_

  /// The last word that no attempt is coming; see EngineIdle.
  struct Idle {
    uint64_t count = 0;
    uint64_t version = 0;
    Status error;
  };
  Idle idle_;  // guarded by mutex_
};

}  // namespace weightd
