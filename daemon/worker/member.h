// One attached client: its data socket, the memory it lent and its ring.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "daemon/base/clock.h"
#include "daemon/base/status.h"
#include "daemon/wire/data_channel.h"
#include "daemon/worker/member_memory.h"
#include "daemon/worker/ring.h"
#include "weightd/v1/worker.pb.h"

namespace weightd {

/// Who a member is, as the daemon announced it.
struct MemberIdentity {
  uint64_t id = 0;
  bool writable = false;
  std::string label;  ///< e.g. "actor 3" or "engine e0 tp 1"
};

/// Thread safety: OnFrame, Attach and Release by the poll thread only; the rest by any thread.
class Member {
 public:
  /// `mapper` outlives this.
  Member(MemberIdentity identity, DataChannel channel, std::shared_ptr<StagingBudget> budget,
         SegmentMapper* mapper);

  const MemberIdentity& identity() const { return identity_; }
  const std::string& label() const { return identity_.label; }
  DataChannel& channel() { return channel_; }

  /// Answers DataAttach, with a ring if the client wants one. Never blocks.
  Status Attach(bool wants_ring);

  /// Handles one frame. Never blocks. A registration is answered once, after its last page: then
  /// the result says so, and `error` in it why it was refused (an earlier one then stays).
  /// \error if the connection must end: a frame that no client sends, or a client that does not
  /// read
  struct Outcome {
    bool registration_ended = false;
    Status error;
    uint64_t mapped_bytes = 0;
  };
  StatusOr<Outcome> OnFrame(ReceivedFrame received);

  /// Tells the client why its connection ends, if it can be told without blocking.
  void Refuse(const Status& why);

  /// The current registration; nullptr before the first.
  std::shared_ptr<const MemberMemory> memory() const;

  /// Asks the client for `part` of a staged shard and blocks until it lies in the ring, where it
  /// stays until the next Fill of this member, or of others when many clients are staged. Step
  /// thread only.
  /// \error UNAVAILABLE PEER_LOST, DEADLINE_EXCEEDED DEADLINE, CANCELLED, or what the client says
  StatusOr<const std::byte*> Fill(const v1::RingFill& request, const std::atomic<bool>* cancelled,
                                  Clock::time_point deadline);

  /// Marks the member as gone and wakes a blocked Fill.
  void MarkLost();
  /// Unmaps and closes everything. The client sees the end of its connection after its memory is
  /// unmapped. \pre no step uses the member
  void Release();

 private:
  StatusOr<Outcome> OnBind(const v1::BindMemory& page);
  Status Send(const v1::DataFrame& frame, const std::vector<int>& fds);

  const MemberIdentity identity_;
  const std::shared_ptr<StagingBudget> budget_;  ///< shared by all members of the worker
  SegmentMapper* const mapper_;
  DataChannel channel_;
  std::mutex send_mutex_;

  // Poll thread.
  MemoryRegistration registration_;
  Status registration_error_;  ///< first error of the registration under way

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::shared_ptr<const MemberMemory> memory_;
  std::shared_ptr<Ring> ring_;
  bool lost_ = false;
  uint64_t fills_asked_ = 0;
  uint64_t fills_answered_ = 0;  ///< the client answers in order
  Status fill_error_;            ///< of the latest answer
};

}  // namespace weightd
