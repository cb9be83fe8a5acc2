// The connections to all workers that hold this client's memory: one per device. A trainer rank has
// one, to the worker of its own device; an engine rank has one more for each other device whose
// worker writes into it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "client/src/data_link.h"
#include "daemon/base/status.h"
#include "weightd/v1/types.pb.h"

namespace weightd {

/// Thread safety: the session's thread only.
class LinkSet {
 public:
  using OfferFn = std::function<std::shared_ptr<const MemoryOffer>()>;
  struct Callbacks {
    /// Runs a task on the session's thread. Called from any thread.
    std::function<void(std::function<void()>)> post;
    /// The device's worker has mapped everything, or why it did not. Session thread.
    std::function<void(const std::string& device, Status)> on_ready;
    /// The device's worker holds no mapping any more; `lost`: it had, and nobody here ended that.
    /// Session thread.
    std::function<void(const std::string& device, bool lost)> on_end;
  };

  /// With `fenced` a link that is let go lives on until its worker has confirmed the unmapping or
  /// is seen dead; otherwise it ends at once.
  LinkSet(bool fenced, Callbacks callbacks) : fenced_(fenced), callbacks_(std::move(callbacks)) {}

  /// Names the device of the memory itself.
  void SetOwn(const std::string& device) { entries_[own_ = device]; }
  const std::string& own() const { return own_; }

  /// Where to lend the memory next, in place of what was known of the endpoint's device. Without a
  /// path that worker is not running: nothing happens until the next word.
  void Aim(const v1::WorkerEndpoint& endpoint);
  /// Attaches wherever that is known and the device's earlier worker has let go.
  void Advance(const OfferFn& offer);
  /// Lets go of all workers and forgets where to lend.
  void LetGo();
  /// Lets go of all and waits for each worker's confirmation, fenced or not.
  void Finish();
  /// Ends all at once.
  void Clear() { entries_.clear(); }

  /// No worker holds the memory.
  bool empty() const;
  /// The worker of the own device has mapped the memory, and so has every other that runs; none is
  /// being replaced.
  bool complete() const;

 private:
  struct Entry {
    std::optional<v1::WorkerEndpoint> aim;  ///< where to attach next
    std::unique_ptr<DataLink> link;
    uint64_t id = 0;  ///< of the link: tells late callbacks of earlier ones apart
    bool finishing = false;
    bool ready = false;
    bool lost = false;  ///< was ready; its worker is being replaced
  };
  void Start(const std::string& device, Entry& entry, std::shared_ptr<const MemoryOffer> offer);
  void End(Entry& entry);
  Entry* Find(const std::string& device, uint64_t id);
  void OnReady(const std::string& device, uint64_t id, Status status);
  void OnEnd(const std::string& device, uint64_t id);

  const bool fenced_;
  const Callbacks callbacks_;
  std::string own_;
  std::map<std::string, Entry> entries_;  ///< by device
  uint64_t next_id_ = 1;
};

}  // namespace weightd
