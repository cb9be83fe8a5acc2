// Catch-up: brings one late or restarted replica to the published version before it serves, from a
// serving peer with the same boxes or from the host copy that workers retained. No trainer takes
// part.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "daemon/sync/mailbox.h"
#include "daemon/sync/participants.h"

namespace weightd {

/// Where a catch-up takes its bytes from.
struct CatchUpSource {
  uint64_t version = 0;
  std::vector<MemberId>
      peers;  ///< ranks of the serving peer, in the target's order; empty: the retained copy
  std::string layout_key;
  /// Whose worker copies, per rank: the engine rank's own device, or that which retained the copy.
  std::vector<std::string> devices;
};

/// Prepare -> Copy -> Commit for one replica; the same states and the same fence as a sync.
/// Thread safety: Run is called once, by one thread.
class CatchUpSession {
 public:
  CatchUpSession(SessionHost& host, Mailbox& mailbox, ReplicaView view, CatchUpSource source)
      : host_(host), mailbox_(mailbox), view_(std::move(view)), source_(std::move(source)) {}

  /// Blocks. On an error the replica is POISONED if bytes may have been written, else as before.
  Status Run();

  /// The other direction: lets the workers keep a host copy of the replica, which serves
  /// source.version, and free older ones. The engine takes no part and goes on serving. Blocks.
  Status Retain();

 private:
  Status Prepare();
  Status Copy(Step step);
  WorkerPlan MakePlan(Step step) const;
  bool Lent();
  std::set<std::string> Devices() const { return {source_.devices.begin(), source_.devices.end()}; }
  Status Commit();
  void Fence();
  void Finish(const Status& status);
  template <typename Done>
  Status Wait(milliseconds limit, const char* what, Done&& done);
  Status Handle(const Event& event);

  SessionHost& host_;
  Mailbox& mailbox_;
  const ReplicaView view_;
  const CatchUpSource source_;
  AttemptId attempt_;
  uint64_t plan_ = 0;
  std::set<MemberId> waiting_;
  std::set<std::string> plan_waiting_;  // devices whose workers have not confirmed the plan
  std::set<std::string> running_;       // devices whose workers run the step
  std::set<std::string> writers_;       // devices whose workers may have written
  bool prepared_ = false;
};

}  // namespace weightd
