// Catch-up: brings one late or restarted replica to the published version before it serves, from a
// serving peer with the same boxes or from the worker's retained host copy. No trainer takes part.
#pragma once

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
};

/// Prepare -> Copy -> Commit for one replica; the same states and the same fence as a sync.
/// Thread safety: Run is called once, by one thread.
class CatchUpSession {
 public:
  CatchUpSession(SessionHost& host, Mailbox& mailbox, ReplicaView view, CatchUpSource source)
      : host_(host), mailbox_(mailbox), view_(std::move(view)), source_(std::move(source)) {}

  /// Blocks. On an error the replica is POISONED if bytes may have been written, else as before.
  Status Run();

  /// The other direction: lets the worker keep a host copy of the replica, which serves
  /// source.version, and free older ones. The engine takes no part and goes on serving. Blocks.
  Status Retain();

 private:
  Status Prepare();
  Status Copy(Step step);
  Status Commit();
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
  bool plan_loaded_ = false;
  bool running_ = false;
  bool prepared_ = false;
  bool touched_ = false;
};

}  // namespace weightd
