// Keeps a forked child from holding our descriptors: the death of a process must be seen by daemon
// and worker even while its forked children live on.
#pragma once

#include <sys/types.h>

#include "daemon/base/status.h"

namespace weightd {

/// OK unless this process was forked from one that had used gRPC: gRPC's threads do not survive a
/// fork, not even when all its channels were closed before. Thread safety: any thread.
/// \error FAILED_PRECONDITION FORKED
Status CheckRuntime();

/// Notes that this process uses gRPC from now on. Thread safety: any thread.
void EnterRuntime();

struct ForkSlot;

/// Marks one open descriptor to be closed in every child that is forked while the ticket lives. The
/// child's handler closes it only if it still is the same file, so that a number that was closed
/// and used again is left alone. It allocates nothing and takes no lock. Move-only.
/// Thread safety: tickets may be made and dropped by any thread.
class ForkTicket {
 public:
  ForkTicket() = default;
  /// \pre fd is open
  explicit ForkTicket(int fd);
  ForkTicket(ForkTicket&& other) noexcept;
  ForkTicket& operator=(ForkTicket&& other) noexcept;
  ForkTicket(const ForkTicket&) = delete;
  ForkTicket& operator=(const ForkTicket&) = delete;
  ~ForkTicket();

 private:
  ForkSlot* slot_ = nullptr;
};

}  // namespace weightd
