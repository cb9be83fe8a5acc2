#include "client/src/fork_guard.h"

#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <mutex>
#include <utility>

namespace weightd {

struct ForkSlot {
  std::atomic<int> fd{-1};
  std::atomic<uint64_t> device{0};
  std::atomic<uint64_t> inode{0};
  bool taken = false;
};

namespace {

/// Slots live in blocks that are never freed: the handler may walk them at any time.
struct Block {
  std::array<ForkSlot, 256> slots;
  std::atomic<Block*> next{nullptr};
};

Block first_block;
std::atomic<pid_t> runtime_owner{0};  // the process that used gRPC first, also in its children
std::mutex
    table_mutex;  // guards ForkSlot::taken and the growth of the list, never used by the handler

void CloseInChild() {
  for (Block* block = &first_block; block != nullptr; block = block->next.load()) {
    for (ForkSlot& slot : block->slots) {
      const int fd = slot.fd.load();
      struct stat file;
      if (fd < 0 || ::fstat(fd, &file) != 0) continue;
      if (file.st_dev == slot.device.load() && file.st_ino == slot.inode.load()) ::close(fd);
    }
  }
}

ForkSlot* TakeSlot() {
  static const int registered = ::pthread_atfork(nullptr, nullptr, &CloseInChild);
  static_cast<void>(registered);
  const std::lock_guard lock(table_mutex);
  for (Block* block = &first_block;; block = block->next.load()) {
    for (ForkSlot& slot : block->slots) {
      if (!std::exchange(slot.taken, true)) return &slot;
    }
    if (block->next.load() == nullptr) block->next.store(new Block);
  }
}

}  // namespace

void EnterRuntime() {
  pid_t nobody = 0;
  runtime_owner.compare_exchange_strong(nobody, ::getpid());
}

Status CheckRuntime() {
  const pid_t seen = runtime_owner.load();
  const pid_t self = ::getpid();
  if (seen == 0 || seen == self) return absl::OkStatus();
  return Error(StatusCode::kFailedPrecondition, reason::kForked,
               "start this process with multiprocessing's spawn or forkserver method, or fork it "
               "before the parent's first Actor or EngineRank connects",
               "process was forked from one that had connected to weightd: pid={} parent={}", self,
               seen);
}

ForkTicket::ForkTicket(int fd) {
  struct stat file;
  if (::fstat(fd, &file) != 0) return;
  slot_ = TakeSlot();
  slot_->device.store(file.st_dev);
  slot_->inode.store(file.st_ino);
  slot_->fd.store(fd);
}

ForkTicket::ForkTicket(ForkTicket&& other) noexcept : slot_(std::exchange(other.slot_, nullptr)) {}

ForkTicket& ForkTicket::operator=(ForkTicket&& other) noexcept {
  std::swap(slot_, other.slot_);
  return *this;
}

ForkTicket::~ForkTicket() {
  if (slot_ == nullptr) return;
  slot_->fd.store(-1);
  const std::lock_guard lock(table_mutex);
  slot_->taken = false;
}

}  // namespace weightd
