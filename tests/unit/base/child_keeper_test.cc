// Real children: /bin/sh with a line of script.
#include "daemon/base/child_keeper.h"

#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>

#include "daemon/base/scoped_fd.h"

namespace weightd {
namespace {

constexpr std::chrono::seconds kPatience{30};

/// Runs `script` again and again and keeps what the keeper tells.
class Rig {
 public:
  explicit Rig(std::string script, milliseconds backoff = milliseconds(1)) {
    ChildKeeper::Callbacks callbacks;
    callbacks.command = [this, script = std::move(script)](uint32_t) -> StatusOr<ChildCommand> {
      return ChildCommand{.program = program,
                          .arguments = {"sh", "-c", script},
                          .environment = {"PATH=/usr/bin:/bin"},
                          .detached = true,
                          .passed_fd = passed_fd};
    };
    callbacks.clean_up = [this](uint32_t generation) { cleaned = generation + 1; };
    callbacks.on_exit = [this](pid_t, const std::string& how) {
      const std::lock_guard lock(mutex_);
      exits_.push_back(how);
      changed_.notify_all();
    };
    keeper = std::make_unique<ChildKeeper>(backoff, std::move(callbacks));
  }

  std::string Exit(size_t number) {
    std::unique_lock lock(mutex_);
    const bool known = changed_.wait_for(lock, kPatience, [&] { return exits_.size() > number; });
    return known ? exits_[number] : "nothing";
  }

  pid_t AwaitPid() const {
    const auto deadline = Clock::now() + kPatience;
    while (keeper->view().pid == 0 && Clock::now() < deadline) ::usleep(1000);
    return keeper->view().pid;
  }

  std::string program = "/bin/sh";
  int passed_fd = -1;
  std::atomic<uint32_t> cleaned{0};
  std::unique_ptr<ChildKeeper> keeper;

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::string> exits_;
};

std::string ReadLines(int fd, int64_t lines) {
  std::string text;
  char buffer[256];
  while (std::count(text.begin(), text.end(), '\n') < lines) {
    const ssize_t count = ::read(fd, buffer, sizeof(buffer));
    if (count <= 0) break;
    text.append(buffer, static_cast<size_t>(count));
  }
  return text;
}

TEST_CASE("a child that ends is started again and cleaned up after") {
  Rig rig("exit 3");
  rig.keeper->Start();
  CHECK(rig.Exit(0) == "exit code 3");
  CHECK(rig.Exit(1) == "exit code 3");
  CHECK(rig.cleaned >= 2);
  CHECK(rig.keeper->view().restarts >= 2);
  CHECK(rig.keeper->view().last_exit == "exit code 3");
}

TEST_CASE("a killed child is started again, one that is let go is not") {
  Rig rig("exec sleep 1000");
  rig.keeper->Start();
  const pid_t first = rig.AwaitPid();
  rig.keeper->Kill();
  CHECK(rig.Exit(0) == "signal 9");
  const pid_t second = rig.AwaitPid();
  CHECK(second != first);
  rig.keeper.reset();
  CHECK(::kill(second, 0) != 0);  // ended and reaped
  CHECK(rig.cleaned == 2);
}

TEST_CASE("a program that cannot be executed counts as a child that has ended") {
  Rig rig("");
  rig.program = "/nowhere/weightd";
  rig.keeper->Start();
  CHECK(rig.Exit(0).find("/nowhere/weightd cannot be started: No such file") == 0);
}

TEST_CASE("a child is apart from the terminal and gets the descriptor that is passed") {
  int pair[2];
  REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
  const ScopedFd ours(pair[0]);
  ScopedFd theirs(pair[1]);
  // Its session, its input and, without glibc's own, the signals that it blocks and ignores.
  Rig rig(R"(exec >&3; ps -o sid= -p $$ | tr -d ' '; readlink /proc/$$/fd/0
             for set in SigBlk SigIgn; do
               bits=$(grep $set /proc/self/status | cut -f2); echo $((0x$bits & 0x7fffffff))
             done
             exec sleep 1000)");
  rig.passed_fd = theirs.get();
  sigset_t blocked, before;
  ::sigfillset(&blocked);
  ::pthread_sigmask(SIG_BLOCK, &blocked, &before);
  ::signal(SIGUSR1, SIG_IGN);
  rig.keeper->Start();
  const pid_t pid = rig.AwaitPid();
  theirs.Reset();
  const std::string told = ReadLines(ours.get(), 4);
  rig.keeper.reset();
  ::signal(SIGUSR1, SIG_DFL);
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  CHECK(told == fmt::format("{}\n/dev/null\n0\n0\n", pid));
}

TEST_CASE("other children keep their exit status, and one that is stolen does no harm") {
  const pid_t other = ::fork();
  if (other == 0) ::_exit(5);
  Rig rig("exec sleep 1000");
  rig.keeper->Start();
  const pid_t first = rig.AwaitPid();
  int status = 0;
  CHECK(::waitpid(other, &status, 0) == other);
  CHECK(WEXITSTATUS(status) == 5);
  SECTION("a program that reaps everything") {
    ::kill(first, SIGKILL);
    while (::waitpid(-1, &status, 0) > 0) break;
  }
  SECTION("a program that ignores SIGCHLD") {
    ::signal(SIGCHLD, SIG_IGN);
    ::kill(first, SIGKILL);
  }
  const std::string how = rig.Exit(0);
  ::signal(SIGCHLD, SIG_DFL);
  CHECK((how == "signal 9" || how.find("was taken") != std::string::npos));
  CHECK(rig.AwaitPid() != first);
}

}  // namespace
}  // namespace weightd
