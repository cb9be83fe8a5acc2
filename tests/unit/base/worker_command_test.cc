#include "daemon/base/worker_command.h"

#include <algorithm>
#include <catch2/catch.hpp>

namespace weightd {

TEST_CASE("a worker is told everything but its secret by its arguments") {
  WorkerCommandLine command;
  command.daemon = "unix:/run/w.sock";
  command.device = "host.1";
  command.socket_path = "/tmp/s";
  std::vector<std::string> arguments = command.Arguments();
  const auto has = [&](const char* text) {
    return std::find(arguments.begin(), arguments.end(), text) != arguments.end();
  };
  CHECK(arguments.front() == "weightd");
  CHECK((has("--worker") && has("host.1") && has("unix:/run/w.sock") && has("/tmp/s")));
  CHECK_FALSE(has("--owner-fd"));
  CHECK_FALSE(has("--no-peer-check"));
  command.owner_fd = 3;
  command.peer_check = false;
  arguments = command.Arguments();
  CHECK((has("--owner-fd") && has("3") && has("--no-peer-check")));
}

TEST_CASE("the secret is in the environment once, in place of an inherited one") {
  const auto environment =
      WorkerCommandLine::Environment({"A=1", "WEIGHTD_WORKER_TOKEN=old", "B=2"}, "new");
  CHECK(environment == std::vector<std::string>{"A=1", "B=2", "WEIGHTD_WORKER_TOKEN=new"});
  CHECK(RandomToken().size() == 32);
  CHECK(RandomToken() != RandomToken());
}

}  // namespace weightd
