#include "daemon/server/worker_supervisor.h"

#include <fmt/format.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <random>

#include "daemon/base/log.h"

extern char** environ;

namespace weightd {
namespace {

constexpr milliseconds kLongestBackoff{5000};

std::string RandomToken() {
  std::random_device device;
  return fmt::format("{:08x}{:08x}{:08x}{:08x}", device(), device(), device(), device());
}

std::string Describe(int wait_status) {
  if (WIFSIGNALED(wait_status)) return fmt::format("signal {}", WTERMSIG(wait_status));
  return fmt::format("exit code {}", WEXITSTATUS(wait_status));
}

}  // namespace

WorkerSupervisor::WorkerSupervisor(WorkerCommandLine command, milliseconds backoff,
                                   Callbacks callbacks)
    : command_(std::move(command)), backoff_(backoff), callbacks_(std::move(callbacks)) {}

WorkerSupervisor::~WorkerSupervisor() {
  LetGo();
  Kill();
}

void WorkerSupervisor::LetGo() {
  {
    const std::lock_guard lock(mu_);
    stopping_ = true;
  }
  changed_.notify_all();
}

void WorkerSupervisor::Start() {
  thread_ = std::jthread([this] { Run(); });
}

std::string WorkerSupervisor::token() {
  const std::lock_guard lock(mu_);
  return token_;
}

void WorkerSupervisor::Kill() {
  const std::lock_guard lock(mu_);
  if (view_.pid > 0) ::kill(view_.pid, SIGKILL);
}

WorkerSupervisor::View WorkerSupervisor::view() {
  const std::lock_guard lock(mu_);
  return view_;
}

std::string WorkerSupervisor::SocketPath(uint32_t generation) const {
  return fmt::format("{}/worker-{}-{}-{}.sock", command_.runtime_dir, command_.device, ::getpid(),
                     generation);
}

pid_t WorkerSupervisor::Spawn(const std::string& token, uint32_t generation) {
  std::vector<std::string> args = {"weightd",
                                   "--worker",
                                   "--device",
                                   command_.device,
                                   "--daemon",
                                   "unix:" + command_.daemon_socket,
                                   "--socket",
                                   SocketPath(generation),
                                   "--threads",
                                   std::to_string(command_.threads),
                                   "--attach-deadline-ms",
                                   std::to_string(command_.attach_deadline.count()),
                                   "--log-level",
                                   command_.log_level,
                                   "--log-format",
                                   command_.log_format};
  if (!command_.peer_check) args.emplace_back("--no-peer-check");
  std::vector<char*> argv;
  argv.reserve(args.size() + 1);
  for (std::string& arg : args) argv.push_back(arg.data());
  argv.push_back(nullptr);
  // The token travels in the environment, which only the owner can read, not in the arguments,
  // which all can.
  std::string secret = "WEIGHTD_WORKER_TOKEN=" + token;
  std::vector<char*> env{secret.data()};
  for (char** entry = environ; *entry != nullptr; ++entry) env.push_back(*entry);
  env.push_back(nullptr);
  sigset_t none;
  ::sigemptyset(&none);
  posix_spawnattr_t attributes;
  ::posix_spawnattr_init(&attributes);
  ::posix_spawnattr_setsigmask(&attributes, &none);
  ::posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK);
  pid_t pid = 0;
  const int error =
      ::posix_spawn(&pid, "/proc/self/exe", nullptr, &attributes, argv.data(), env.data());
  ::posix_spawnattr_destroy(&attributes);
  if (error != 0) {
    spdlog::error("cannot start a worker: {} device={}", std::strerror(error), command_.device);
    return 0;
  }
  return pid;
}

void WorkerSupervisor::Run() {
  milliseconds backoff = backoff_;
  std::unique_lock lock(mu_);
  for (uint32_t generation = 0; !stopping_; ++generation) {
    token_ = RandomToken();
    const auto started = Clock::now();
    const pid_t pid = view_.pid = Spawn(token_, generation);
    if (pid > 0) {
      spdlog::info("worker started: device={} pid={}", command_.device, pid);
      lock.unlock();
      int status = 0;
      while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) {
      }
      ::unlink(SocketPath(generation).c_str());  // a killed worker leaves it behind
      lock.lock();
      view_.last_exit = Describe(status);
    }
    view_.pid = 0;
    if (stopping_) return;
    ++view_.restarts;
    spdlog::error("worker died and is started again: device={} pid={} cause={}", command_.device,
                  pid, view_.last_exit);
    const std::string how = view_.last_exit;
    lock.unlock();
    callbacks_.on_exit(command_.device, how);
    lock.lock();
    // A worker that lived is replaced soon; one that dies at its start is given ever more time.
    const bool lived = Clock::now() - started > std::chrono::seconds(5);
    backoff = lived ? backoff_ : std::min(backoff * 2, kLongestBackoff);
    changed_.wait_for(lock, backoff, [this] { return stopping_; });
  }
}

}  // namespace weightd
