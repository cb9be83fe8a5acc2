#include "daemon/base/child_keeper.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

extern char** environ;

namespace weightd {
namespace {

constexpr milliseconds kLongestBackoff{5000};
constexpr std::chrono::seconds kLived{5};

std::string Describe(int wait_status) {
  if (WIFSIGNALED(wait_status)) return fmt::format("signal {}", WTERMSIG(wait_status));
  return fmt::format("exit code {}", WEXITSTATUS(wait_status));
}

/// Owns what posix_spawn is told beside the command.
class SpawnPlan {
 public:
  explicit SpawnPlan(const ChildCommand& command) {
    ::posix_spawn_file_actions_init(&actions_);
    ::posix_spawnattr_init(&attributes_);
    sigset_t none, all;
    ::sigemptyset(&none);
    ::sigfillset(&all);
    ::posix_spawnattr_setsigmask(&attributes_, &none);
    ::posix_spawnattr_setsigdefault(&attributes_, &all);
    int flags = POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF;
    if (command.detached) flags |= POSIX_SPAWN_SETSID;
    ::posix_spawnattr_setflags(&attributes_, static_cast<int16_t>(flags));
    if (command.detached) Detach();
    if (command.passed_fd >= 0) {
      // Onto itself it only loses its close-on-exec flag.
      ::posix_spawn_file_actions_adddup2(&actions_, command.passed_fd, ChildKeeper::kPassedFd);
    }
  }
  ~SpawnPlan() {
    ::posix_spawnattr_destroy(&attributes_);
    ::posix_spawn_file_actions_destroy(&actions_);
  }
  SpawnPlan(const SpawnPlan&) = delete;
  SpawnPlan& operator=(const SpawnPlan&) = delete;

  const posix_spawn_file_actions_t* actions() const { return &actions_; }
  const posix_spawnattr_t* attributes() const { return &attributes_; }

 private:
  void Detach() {
    ::posix_spawn_file_actions_addopen(&actions_, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    if (::fcntl(STDERR_FILENO, F_GETFD) >= 0) {
      ::posix_spawn_file_actions_adddup2(&actions_, STDERR_FILENO, STDOUT_FILENO);
      return;
    }
    for (const int fd : {STDOUT_FILENO, STDERR_FILENO}) {
      ::posix_spawn_file_actions_addopen(&actions_, fd, "/dev/null", O_WRONLY, 0);
    }
  }

  posix_spawn_file_actions_t actions_;
  posix_spawnattr_t attributes_;
};

std::vector<char*> Pointers(std::vector<std::string>& texts) {
  std::vector<char*> pointers;
  pointers.reserve(texts.size() + 1);
  for (std::string& text : texts) pointers.push_back(text.data());
  pointers.push_back(nullptr);
  return pointers;
}

}  // namespace

ChildKeeper::ChildKeeper(milliseconds backoff, Callbacks callbacks)
    : backoff_(backoff), callbacks_(std::move(callbacks)) {}

ChildKeeper::~ChildKeeper() {
  LetGo();
  Kill();
}

void ChildKeeper::LetGo() {
  {
    const std::lock_guard lock(mu_);
    stopping_ = true;
  }
  changed_.notify_all();
}

void ChildKeeper::Start() {
  thread_ = std::jthread([this] { Run(); });
}

void ChildKeeper::Kill() {
  const std::lock_guard lock(mu_);
  if (view_.pid > 0) ::kill(view_.pid, SIGKILL);
}

ChildKeeper::View ChildKeeper::view() {
  const std::lock_guard lock(mu_);
  return view_;
}

// \pre locked
StatusOr<pid_t> ChildKeeper::StartChild(uint32_t generation) {
  WEIGHTD_ASSIGN_OR_RETURN(ChildCommand command, callbacks_.command(generation));
  const SpawnPlan plan(command);
  const std::vector<char*> argv = Pointers(command.arguments);
  const std::vector<char*> env = Pointers(command.environment);
  pid_t pid = 0;
  const int error = ::posix_spawn(&pid, command.program.c_str(), plan.actions(), plan.attributes(),
                                  argv.data(), env.data());
  if (error != 0) {
    return Error(StatusCode::kFailedPrecondition, reason::kWorkerStart,
                 "check the file, the limit of processes and the memory of this user",
                 "{} cannot be started: {}", command.program, std::strerror(error));
  }
  if (callbacks_.on_start) callbacks_.on_start(pid);
  return pid;
}

/// Waits for the end of the child. Its number stays its own until the lock is held again, so that
/// Kill never meets another process.
std::string ChildKeeper::Reap(pid_t pid, std::unique_lock<std::mutex>& lock) {
  lock.unlock();
  siginfo_t info{};
  while (::waitid(P_PID, static_cast<id_t>(pid), &info, WEXITED | WNOWAIT) < 0 && errno == EINTR) {
  }
  lock.lock();
  view_.pid = 0;
  int status = 0;
  const bool reaped = ::waitpid(pid, &status, WNOHANG) == pid;
  return reaped ? Describe(status) : "its exit status was taken by other code of this process";
}

void ChildKeeper::Run() {
  milliseconds backoff = backoff_;
  std::unique_lock lock(mu_);
  for (uint32_t generation = 0; !stopping_; ++generation) {
    const auto started = Clock::now();
    const StatusOr<pid_t> pid = StartChild(generation);
    if (pid.ok()) {
      view_.pid = *pid;
      view_.last_exit = Reap(*pid, lock);
    } else {
      view_.last_exit = Message(pid.status());
    }
    const std::string how = view_.last_exit;
    lock.unlock();
    if (callbacks_.clean_up) callbacks_.clean_up(generation);
    lock.lock();
    if (stopping_) return;
    ++view_.restarts;
    lock.unlock();
    callbacks_.on_exit(pid.ok() ? *pid : 0, how);
    lock.lock();
    // A child that lived is replaced soon; one that dies at its start is given ever more time.
    const bool lived = Clock::now() - started > kLived;
    backoff = lived ? backoff_ : std::min(backoff * 2, kLongestBackoff);
    changed_.wait_for(lock, backoff, [this] { return stopping_; });
  }
}

std::vector<std::string> CopyEnvironment() {
  std::vector<std::string> copy;
  for (char** entry = environ; *entry != nullptr; ++entry) copy.emplace_back(*entry);
  return copy;
}

}  // namespace weightd
