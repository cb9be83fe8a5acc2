#include "daemon/device/sigbus_guard.h"

#include <signal.h>
#include <sys/mman.h>

#include <array>
#include <atomic>
#include <mutex>
#include <new>

namespace weightd::sigbus_guard {
namespace {

// Read by the handler, so everything is lock-free and entries are never freed, only reused.
struct Entry {
  std::atomic<uintptr_t> begin{0};  // 0: free
  std::atomic<uintptr_t> end{0};
  std::atomic<bool> lost{false};
};

struct Chunk {
  std::array<Entry, 512> entries;
  std::atomic<Chunk*> next{nullptr};
};

static_assert(std::atomic<uintptr_t>::is_always_lock_free);

Chunk g_first;
std::mutex g_mutex;  // serialises Add; never taken by the handler
struct sigaction g_previous;

Entry* Find(uintptr_t address) {
  for (Chunk* chunk = &g_first; chunk != nullptr; chunk = chunk->next.load()) {
    for (Entry& entry : chunk->entries) {
      const uintptr_t begin = entry.begin.load();
      if (begin != 0 && address >= begin && address < entry.end.load()) return &entry;
    }
  }
  return nullptr;
}

void Handle(int signal, siginfo_t* info, void* context) {
  Entry* entry = Find(reinterpret_cast<uintptr_t>(info->si_addr));
  if (entry != nullptr) {
    const uintptr_t begin = entry->begin.load();
    // NOLINTNEXTLINE(performance-no-int-to-ptr): a number, so that a signal handler may read it
    void* zeros = mmap(reinterpret_cast<void*>(begin), entry->end.load() - begin,
                       PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (zeros != MAP_FAILED) {
      entry->lost.store(true);
      return;
    }
  }
  if ((g_previous.sa_flags & SA_SIGINFO) != 0 && g_previous.sa_sigaction != nullptr) {
    g_previous.sa_sigaction(signal, info, context);
    return;
  }
  if (g_previous.sa_handler != SIG_DFL && g_previous.sa_handler != SIG_IGN) {
    g_previous.sa_handler(signal);
    return;
  }
  // The faulting instruction runs again and meets the default action.
  struct sigaction fallback {};
  fallback.sa_handler = SIG_DFL;
  sigaction(SIGBUS, &fallback, nullptr);
}

void Install() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action {};
    action.sa_sigaction = &Handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &g_previous);
  });
}

Entry* TakeFree() {
  Chunk* chunk = &g_first;
  while (true) {
    for (Entry& entry : chunk->entries) {
      if (entry.begin.load() == 0) return &entry;
    }
    Chunk* next = chunk->next.load();
    if (next == nullptr) {
      next = new (std::nothrow) Chunk;
      if (next == nullptr) return nullptr;
      chunk->next.store(next);
    }
    chunk = next;
  }
}

}  // namespace

void* Add(std::byte* begin, uint64_t size_bytes) {
  Install();
  const std::lock_guard lock(g_mutex);
  Entry* entry = TakeFree();
  if (entry == nullptr) return nullptr;
  entry->lost.store(false);
  entry->end.store(reinterpret_cast<uintptr_t>(begin) + size_bytes);
  entry->begin.store(reinterpret_cast<uintptr_t>(begin));
  return entry;
}

void Remove(void* entry) {
  if (entry != nullptr) static_cast<Entry*>(entry)->begin.store(0);
}

bool Lost(const void* entry) {
  return entry != nullptr && static_cast<const Entry*>(entry)->lost.load();
}

}  // namespace weightd::sigbus_guard
