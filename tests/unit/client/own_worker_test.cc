// The worker that a client runs, with a script in its place; and where the program is looked for.
#include "client/src/own_worker.h"

#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <condition_variable>
#include <filesystem>
#include <fstream>
#include <queue>

#include "client/src/worker_binary.h"
#include "tests/unit/client/fake_daemon.h"

namespace weightd::testing {
namespace {

std::string MakeScript(const std::string& path, const std::string& body) {
  std::ofstream(path) << "#!/bin/sh\n" << body << "\n";
  ::chmod(path.c_str(), 0755);
  return path;
}

std::string TextOf(const std::string& path) {
  const auto deadline = Clock::now() + kPatience;
  while (!std::filesystem::exists(path) && Clock::now() < deadline) ::usleep(1000);
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// A client whose worker is a script; its sockets lie in run().
class Rig {
 public:
  explicit Rig(const std::string& body) : out(dir_.path() + "/out") {
    std::filesystem::create_directory(run());
    settings.binary = MakeScript(dir_.path() + "/worker", body);
    settings.environment = {"PATH=/usr/bin:/bin", "XDG_RUNTIME_DIR=" + run(), "OUT=" + out,
                            "CUDA_VISIBLE_DEVICES=3"};
    worker = std::make_unique<OwnWorker>(settings, "unix:/daemon.sock",
                                         [this](uint64_t order, const std::string& how) {
                                           const std::lock_guard lock(mutex_);
                                           ends_.emplace(order, how);
                                           changed_.notify_all();
                                         });
    order.set_device("host");
    order.set_token("secret");
    order.set_attach_within_ms(30'000);
    order.mutable_settings()->set_restart_backoff_ms(1);
    order.mutable_settings()->set_threads(5);
  }

  /// The next end, as the session hands it on.
  std::optional<OwnWorker::Report> NextEnd(bool awaited) {
    std::unique_lock lock(mutex_);
    REQUIRE(changed_.wait_for(lock, kPatience, [this] { return !ends_.empty(); }));
    const auto [number, how] = ends_.front();
    ends_.pop();
    lock.unlock();
    return worker->Ended(number, how, awaited);
  }
  std::string run() const { return dir_.path() + "/run"; }
  bool Empty() const { return std::filesystem::is_empty(run()); }
  v1::WorkerEndpoint Endpoint(const std::string& device) const {
    v1::WorkerEndpoint endpoint;
    endpoint.set_device(device);
    endpoint.set_socket_path("/somewhere");
    return endpoint;
  }

 private:
  TempDir dir_;

 public:
  const std::string out;
  SpawnSettings settings;
  v1::StartWorker order;
  std::unique_ptr<OwnWorker> worker;

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::queue<std::pair<uint64_t, std::string>> ends_;
};

}  // namespace

TEST_CASE("the worker gets the order, the client's environment and a directory of its own") {
  Rig rig(
      "(echo $WEIGHTD_WORKER_TOKEN $CUDA_VISIBLE_DEVICES; echo $@; stat -c %a $XDG_RUNTIME_DIR/*)"
      " > $OUT.new; mv $OUT.new $OUT; exec sleep 1000");
  rig.worker->Start(rig.order);
  const std::string text = TextOf(rig.out);
  const std::string folder = std::filesystem::directory_iterator(rig.run())->path().string();
  CHECK(text == "secret\n--worker --device host --daemon unix:/daemon.sock --socket " + folder +
                    "/worker.sock --threads 5 --attach-deadline-ms 0 --log-level --log-format "
                    "--no-peer-check --owner-fd 3\n700\n");
  rig.worker->Quit();
  CHECK(rig.Empty());
}

TEST_CASE("a client gives up a worker that ends three times before the daemon has it") {
  Rig rig("exit 7");
  rig.worker->Start(rig.order);
  for (int start = 1; start < OwnWorker::kStarts; ++start) {
    const auto report = rig.NextEnd(true);
    REQUIRE(report.has_value());
    CHECK(report->message.how() == "exit code 7");
    CHECK_FALSE(report->message.given_up());
    CHECK(FieldsOf(report->error).reason == reason::kWorkerLost);
  }
  const auto last = rig.NextEnd(true);
  REQUIRE(last.has_value());
  CHECK(last->message.given_up());
  CHECK(FieldsOf(last->error).reason == reason::kWorkerStart);
  CHECK(Message(last->error).find(rig.settings.binary) != std::string::npos);
  CHECK(Message(last->error).find("exit code 7") != std::string::npos);
  CHECK(rig.worker->deadline() == Clock::time_point::max());
  CHECK(rig.Empty());
}

TEST_CASE("a worker that the daemon has had is started again however often it dies") {
  Rig rig("exit 7");
  rig.worker->Start(rig.order);
  for (int start = 0; start < 2 * OwnWorker::kStarts; ++start) {
    rig.worker->Seen(rig.Endpoint("host"));
    CHECK_FALSE(rig.NextEnd(true)->message.given_up());
  }
  rig.worker->Seen(rig.Endpoint("host.1"));  // another's
  for (int start = 0; start < 2 * OwnWorker::kStarts; ++start) {
    CHECK_FALSE(rig.NextEnd(false)->message.given_up());  // nobody waits
  }
  rig.worker->Quit();
  CHECK(rig.Empty());
}

TEST_CASE("a worker that does not attach in time is given up if somebody waits") {
  Rig rig("exec sleep 1000");
  rig.worker->Start(rig.order);
  CHECK(rig.worker->deadline() < Clock::time_point::max());
  CHECK_FALSE(rig.worker->Late(false).has_value());
  rig.worker->Start(rig.order);
  const auto report = rig.worker->Late(true);
  REQUIRE(report.has_value());
  CHECK(report->message.given_up());
  CHECK(Message(report->error).find("in time") != std::string::npos);
  rig.worker->Start(rig.order);
  rig.worker->Seen(rig.Endpoint("host"));
  CHECK(rig.worker->deadline() == Clock::time_point::max());
}

TEST_CASE("the daemon may have the worker killed, and end its order") {
  Rig rig("echo $$ > $OUT.new; mv $OUT.new $OUT; exec sleep 1000");
  rig.worker->Start(rig.order);
  const int first = std::stoi(TextOf(rig.out));
  std::filesystem::remove(rig.out);
  v1::StopWorker stop;
  stop.set_device("host.1");
  rig.worker->Stop(stop);  // not ours
  CHECK(::kill(first, 0) == 0);
  stop.set_device("host");
  stop.set_again(true);
  rig.worker->Stop(stop);
  CHECK(rig.NextEnd(false)->message.how() == "signal 9");
  const int second = std::stoi(TextOf(rig.out));
  CHECK(second != first);
  stop.set_again(false);
  rig.worker->Stop(stop);
  CHECK(::kill(second, 0) != 0);
  CHECK(rig.Empty());
}

TEST_CASE("a client that offers no worker starts none") {
  OwnWorker worker(std::nullopt, "unix:/daemon.sock", nullptr);
  v1::StartWorker order;
  order.set_device("host");
  worker.Start(order);
  CHECK(worker.deadline() == Clock::time_point::max());
  CHECK_FALSE(worker.Ended(1, "signal 9", true).has_value());
}

TEST_CASE("the folder of sockets falls back to /tmp, and its path leaves room for a socket") {
  for (const std::string& xdg : {std::string(), std::string("relative"), std::string("/nowhere"),
                                 "/tmp/" + std::string(90, 'x')}) {
    const StatusOr<std::string> folder = MakeSocketFolder(xdg);
    REQUIRE(folder.ok());
    CHECK(folder->starts_with("/tmp/weightd-worker-"));
    CHECK(::rmdir(folder->c_str()) == 0);
  }
}

TEST_CASE("the program is looked for where it was named, beside the library, in PATH") {
  const TempDir dir;
  std::filesystem::create_directories(dir.path() + "/lib");
  std::filesystem::create_directories(dir.path() + "/bin");
  std::filesystem::create_directories(dir.path() + "/path/weightd");  // a directory of that name
  const BinaryPlaces places{.library_dir = dir.path() + "/lib",
                            .search_path = "/nowhere:" + dir.path() + "/path:" + dir.path()};
  const Status missing = FindWorkerBinary(places).status();
  CHECK(FieldsOf(missing).reason == reason::kWorkerStart);
  for (const std::string& place :
       {std::string("worker_binary"), std::string("WEIGHTD_BIN"), dir.path() + "/lib/weightd",
        dir.path() + "/lib/../bin/weightd", "PATH (" + places.search_path + ")"}) {
    CHECK(Message(missing).find(place) != std::string::npos);
  }
  std::ofstream(dir.path() + "/weightd") << "not executable";
  CHECK_FALSE(FindWorkerBinary(places).ok());
  const std::string in_path = MakeScript(dir.path() + "/weightd", "");
  CHECK(*FindWorkerBinary(places) == in_path);
  const std::string installed = MakeScript(dir.path() + "/bin/weightd", "");
  CHECK(*FindWorkerBinary(places) == installed);
  const std::string beside = MakeScript(dir.path() + "/lib/weightd", "");
  CHECK(*FindWorkerBinary(places) == beside);
  BinaryPlaces named = places;
  named.variable = in_path;
  CHECK(*FindWorkerBinary(named) == in_path);
  named.option = "/nowhere/weightd";
  const std::string text = Message(FindWorkerBinary(named).status());
  CHECK(text.find("worker_binary (/nowhere/weightd)") != std::string::npos);
}

}  // namespace weightd::testing
