#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <csignal>
#include <cstdio>

#include "client/src/fork_guard.h"
#include "tests/unit/client/client_testing.h"
#include "tests/unit/client/fake_daemon.h"

extern char** environ;

namespace weightd::testing {
namespace {

/// Runs `body` in a forked child and returns its exit code.
template <typename Body>
int InChild(Body body) {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(body());
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

bool IsOpen(int fd) { return ::fcntl(fd, F_GETFD) >= 0; }

}  // namespace

TEST_CASE("a forked child does not have guarded descriptors, its parent keeps them") {
  const ScopedFd guarded(::memfd_create("guarded", 0));
  const ScopedFd other(::memfd_create("other", 0));
  const ForkTicket ticket(guarded.get());
  CHECK(InChild([&] { return IsOpen(guarded.get()) ? 1 : IsOpen(other.get()) ? 0 : 2; }) == 0);
  CHECK(IsOpen(guarded.get()));
}

TEST_CASE("a descriptor number that was used again is left alone in the child") {
  ScopedFd guarded(::memfd_create("guarded", 0));
  const ForkTicket ticket(guarded.get());
  const int number = guarded.get();
  guarded.Reset();
  const ScopedFd next(::memfd_create("next", 0));
  REQUIRE(next.get() == number);
  CHECK(InChild([number] { return IsOpen(number) ? 0 : 1; }) == 0);
}

TEST_CASE("a dropped ticket guards nothing, and many tickets guard all") {
  const ScopedFd kept(::memfd_create("kept", 0));
  { const ForkTicket dropped(kept.get()); }
  std::vector<ScopedFd> fds;
  std::vector<ForkTicket> tickets;
  for (int i = 0; i < 400; ++i) {
    fds.emplace_back(::memfd_create("many", 0));
    tickets.emplace_back(fds.back().get());
  }
  CHECK(InChild([&] {
          for (const ScopedFd& fd : fds) {
            if (IsOpen(fd.get())) return 1;
          }
          return IsOpen(kept.get()) ? 0 : 2;
        }) == 0);
}

TEST_CASE("the death of a trainer is seen while its forked child lives") {
  TempDir dir;
  FakeWorker worker(dir.path() + "/worker.sock", "secret");
  FakeDaemon daemon(dir.path() + "/daemon.sock", &worker);
  daemon.Start();
  const std::string address = daemon.address();
  int out[2];
  REQUIRE(::pipe2(out, O_CLOEXEC) == 0);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, out[1], STDOUT_FILENO);
  const char* argv[] = {WEIGHTD_FORK_VICTIM, address.c_str(), nullptr};
  pid_t victim = 0;
  REQUIRE(::posix_spawn(&victim, argv[0], &actions, nullptr, const_cast<char**>(argv), environ) ==
          0);
  posix_spawn_file_actions_destroy(&actions);
  ::close(out[1]);
  FILE* output = ::fdopen(out[0], "r");
  int child = 0;
  char refused = 0;
  REQUIRE(std::fscanf(output, "%d %c", &child, &refused) == 2);
  CHECK(refused == 'y');
  REQUIRE(worker.AwaitBound(1));
  ::kill(victim, SIGKILL);
  CHECK(daemon.actor.AwaitClosed(1));
  CHECK(worker.AwaitEnded(1));
  CHECK(::kill(child, 0) == 0);
  ::kill(child, SIGKILL);
  ::waitpid(victim, nullptr, 0);
  std::fclose(output);
}

}  // namespace weightd::testing
