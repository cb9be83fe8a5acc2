// All clients of a worker: accepts them, watches them, serves their frames and keeps their memory
// for as long as a step uses it.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/base/scoped_fd.h"
#include "daemon/base/status.h"
#include "daemon/worker/data_listener.h"
#include "daemon/worker/member.h"
#include "weightd/v1/worker.pb.h"

namespace weightd {

/// Takes what a worker has to tell its daemon. Any thread, no lock held.
using ReportFn = std::function<void(v1::WorkerReport)>;

class MemberTable;

/// Members held by a running step: their memory stays mapped until this is destroyed. The loss of
/// one of them sets the step's cancel flag. Thread safety: one thread, but for what the table does.
class PinnedMembers {
 public:
  struct Entry {
    std::shared_ptr<Member> member;
    std::shared_ptr<const MemberMemory> memory;
  };
  PinnedMembers() = default;
  ~PinnedMembers();
  PinnedMembers(const PinnedMembers&) = delete;
  PinnedMembers& operator=(const PinnedMembers&) = delete;

  /// The entry of a member, or nullptr if it was not pinned.
  const Entry* Find(uint64_t member) const;
  /// OK, or UNAVAILABLE PEER_LOST naming the first member that was lost.
  Status lost() const;

 private:
  friend class MemberTable;
  MemberTable* table_ = nullptr;
  std::atomic<bool>* cancel_ = nullptr;
  std::map<uint64_t, Entry> entries_;
  std::string lost_label_;  ///< guarded by the table
};

/// Thread safety: any thread.
class MemberTable {
 public:
  struct Options {
    std::string socket_path;
    bool check_peer = true;  ///< refuse clients of other users
    /// A client has this long to say who it is, and the daemon to announce it.
    milliseconds attach_deadline{5000};
    /// Maps what clients lend; used by the poll thread only. nullptr: shared memory of the host.
    std::shared_ptr<SegmentMapper> mapper;  ///< shared so that options can be copied
  };

  /// Listens and starts the poll thread. \error UNAVAILABLE SOCKET, see DataListener
  static StatusOr<std::unique_ptr<MemberTable>> Create(const Options& options, ReportFn report);
  /// Ends all connections without reports. \pre no PinnedMembers is left
  ~MemberTable();

  /// Accepts a client that presents this member id and token, now and again after its loss.
  void Expect(const v1::ExpectMember& expect);
  /// Drops a member and its expectation. Reports MemberLost exactly once, when nothing of it is
  /// mapped any more.
  void Forget(uint64_t member);

  /// Pins members. `cancel` outlives the result and is set when one of them is lost.
  /// \error UNAVAILABLE PEER_LOST naming a member that is not attached or has registered nothing
  Status Pin(std::span<const uint64_t> members, std::atomic<bool>* cancel, PinnedMembers* pinned);

  /// Bytes of all members' rings that may hold pages now.
  uint64_t staging_bytes() const { return budget_->resident_bytes(); }

 private:
  friend class PinnedMembers;

  struct Expectation {
    MemberIdentity identity;
    std::string token;
  };
  /// One accepted socket: first nobody, then a member.
  struct Connection {
    DataChannel channel;             ///< until it is a member's
    std::shared_ptr<Member> member;  ///< shared with steps that use it
    ScopedFd pidfd;
    v1::DataAttach attach;
    bool has_attach = false;
    Clock::time_point deadline;  ///< until it is a member's
  };
  struct Departure {
    std::shared_ptr<Member> member;
    std::string cause;
  };

  MemberTable(Options options, ReportFn report, DataListener listener);
  void Wake();
  void Unpin(PinnedMembers* pinned);

  // Poll thread only.
  void Poll();
  void OnEvent(uint64_t event);
  void AcceptAll();
  void ReadPending(uint64_t key);
  void TryAttach(uint64_t key);
  Status AttachMember(uint64_t key, const Expectation& expectation);
  void ReadMember(uint64_t key);
  void Refuse(uint64_t key, const Status& why);
  void RetryPending();
  void Lose(uint64_t key, const std::string& cause);
  uint64_t KeyOf(uint64_t member) const;
  void FinishDepartures();
  void HandleForgets();
  void CheckDeadlines();
  int NextTimeoutMillis() const;
  bool Watch(int fd, uint64_t event);
  void ReportAttached(const Member& member, const Member::Outcome& outcome);

  const Options options_;
  const ReportFn report_;
  DataListener listener_;
  ScopedFd epoll_;
  ScopedFd wake_;
  const std::shared_ptr<StagingBudget> budget_;  ///< shared with every member

  // Poll thread only.
  std::map<uint64_t, Connection> connections_;
  uint64_t next_key_ = 1;
  Clock::time_point accept_again_{};  ///< set when descriptors ran out

  std::mutex mutex_;
  bool stopping_ = false;
  std::map<uint64_t, Expectation> expected_;
  std::map<uint64_t, std::shared_ptr<Member>> live_;  ///< by member id
  std::map<uint64_t, Departure> departing_;           ///< lost, but a step may still use its memory
  std::map<uint64_t, int> pins_;
  std::vector<PinnedMembers*> pinned_;
  std::deque<uint64_t> forgets_;

  std::jthread thread_;
};

}  // namespace weightd
