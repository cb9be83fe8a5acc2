// The connection to the worker that serves this client's memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "client/src/dial.h"
#include "client/src/pages.h"
#include "daemon/base/status.h"
#include "daemon/wire/data_channel.h"
#include "weightd/v1/types.pb.h"
#include "weightd/v1/worker.pb.h"

namespace weightd {

/// The memory that a client offers. Immutable while a link uses it.
struct MemoryOffer {
  std::vector<SegmentFrame> segments;
  std::vector<v1::BindMemory> bindings;
  bool wants_ring = false;
  /// Copies what the worker asks for into a slot of the ring; called by the link's thread. Empty
  /// when nothing is staged.
  std::function<Status(const v1::RingFill& fill, std::span<std::byte> slot)> fill;
  /// Keeps alive what `segments` and `fill` refer to.
  std::shared_ptr<const void> owner;
};

/// Attaches to a worker, offers the memory and then serves the worker's ring, all on a thread of
/// its own. A worker that cannot be reached is tried again for kAttachTimeout: its restart takes a
/// moment.
/// Thread safety: Finish and the destructor are called by one thread; the callbacks come from the
/// link's thread and must not destroy the link.
class DataLink {
 public:
  static constexpr milliseconds kAttachTimeout{15'000};

  struct Callbacks {
    /// Once: OK when the worker has mapped everything, or why it did not.
    std::function<void(Status)> on_ready;
    /// Once, last: the worker has closed its end, so it holds no mapping any more; also when the
    /// link was never attached.
    std::function<void()> on_end;
  };

  DataLink(v1::WorkerEndpoint endpoint, std::shared_ptr<const MemoryOffer> offer,
           Callbacks callbacks);
  /// Closes at once, without the worker's confirmation.
  ~DataLink();
  DataLink(const DataLink&) = delete;
  DataLink& operator=(const DataLink&) = delete;

  /// Asks the worker to unmap; on_end follows when it has. Does not block.
  void Finish();

 private:
  void Run();
  Status Attach();
  StatusOr<DataChannel> Connect(Clock::time_point deadline);
  Status Greet(Clock::time_point deadline);
  Status TakeRing(ReceivedFrame attached);
  Status Offer(Clock::time_point deadline);
  Status ServeFill(const v1::RingFill& fill);
  Status Serve();
  void AwaitEnd();

  const v1::WorkerEndpoint endpoint_;
  const std::shared_ptr<const MemoryOffer> offer_;
  const Callbacks callbacks_;

  std::mutex mutex_;
  bool finishing_ = false;  // guarded by mutex_
  int shared_fd_ = -1;      // guarded by mutex_; the channel's socket while it is open

  // The thread's own.
  ForkTicket ticket_;
  DataChannel channel_;
  std::byte* ring_ = nullptr;
  size_t ring_bytes_ = 0;
  size_t slot_bytes_ = 0;

  std::thread thread_;
};

}  // namespace weightd
