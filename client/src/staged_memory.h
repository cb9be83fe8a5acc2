// Shards that are not lent: their memory is known here, and the worker asks for parts of it.
#pragma once

#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "client/src/registration.h"
#include "daemon/base/status.h"
#include "weightd/v1/worker.pb.h"

namespace weightd {

/// Memory of one shard during one sync.
struct StagedShard {
  size_t position = 0;  ///< in ActorRegistration::memory
  const std::byte* address = nullptr;
  Dims strides;
};

/// Thread safety: all functions may be called by any thread. Once End has returned no memory that
/// was given to Begin is read any more.
class StagedMemory {
 public:
  explicit StagedMemory(std::shared_ptr<const ActorRegistration> registration);

  /// Gives the memory of one sync; shards that were registered with an address keep it otherwise.
  /// \error FAILED_PRECONDITION MISSING_TENSOR if a staged shard has no memory
  Status Begin(std::span<const StagedShard> shards);
  void End();

  /// Copies what the worker asks for into a slot, contiguous and row-major.
  /// \error FAILED_PRECONDITION MISSING_TENSOR if the shard has no memory now
  /// \error INVALID_ARGUMENT PROTOCOL if the request fits neither the shard nor the slot
  Status Fill(const v1::RingFill& fill, std::span<std::byte> slot);

 private:
  void Reset();
  Status Missing(size_t position) const;

  const std::shared_ptr<const ActorRegistration> registration_;  // shared with the session
  std::mutex mutex_;
  std::vector<StagedShard> shards_;  // guarded by mutex_; one per shard
};

}  // namespace weightd
