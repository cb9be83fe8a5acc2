#include "daemon/sync/spawned_workers.h"

#include <catch2/catch.hpp>

namespace weightd {
namespace {

/// Keeps what it is told.
class FakeClient : public OwnerPort {
 public:
  void SendStartWorker(const WorkerOrder& order) override { orders.push_back(order); }
  void SendStopWorker(const std::string& device, bool again, const std::string&) override {
    stops.push_back(device + (again ? " again" : ""));
  }
  const std::string& token() const { return orders.back().token; }
  std::vector<WorkerOrder> orders;
  std::vector<std::string> stops;
};

struct Fixture {
  std::vector<std::string> restarts;
  SpawnedWorkers workers{{.threads = 3},
                         [this](const std::string& device) { restarts.push_back(device); }};
  std::shared_ptr<FakeClient> a = std::make_shared<FakeClient>();
  std::shared_ptr<FakeClient> b = std::make_shared<FakeClient>();
};

}  // namespace

TEST_CASE_METHOD(Fixture, "the first client is asked, the others use its worker") {
  CHECK_FALSE(workers.Serves("host"));
  workers.Offer(a, "actor 0", "host");
  workers.Offer(b, "actor 1", "host");
  REQUIRE(a->orders.size() == 1);
  CHECK(b->orders.empty());
  CHECK(a->orders[0].device == "host");
  CHECK(a->orders[0].settings.threads == 3);
  CHECK(workers.Serves("host"));
  CHECK_FALSE(workers.Serves("host.1"));
  workers.Offer(a, "actor 0", "host");  // it registers again
  CHECK(a->orders.size() == 1);
}

TEST_CASE_METHOD(Fixture, "only the owner's token opens the device, and only that device") {
  CHECK(workers.Owner("host", "") == nullptr);
  workers.Offer(a, "actor 0", "host");
  workers.Offer(b, "actor 1", "host.1");
  CHECK(workers.Owner("host", "guessed") == nullptr);
  CHECK(workers.Owner("host", "") == nullptr);
  CHECK(workers.Owner("host.1", a->token()) == nullptr);
  CHECK(workers.Owner("host", a->token()) == a);
  CHECK(a->token() != b->token());
}

TEST_CASE_METHOD(Fixture, "the next client is asked when the owner and its worker have ended") {
  workers.Offer(a, "actor 0", "host");
  workers.Offer(b, "actor 1", "host");
  workers.Up("host", 71);
  const std::string token = a->token();
  workers.Withdraw(a.get());
  CHECK(b->orders.empty());  // its worker may still write
  CHECK(workers.Owner("host", token) == nullptr);
  CHECK(workers.Views().front().owner.empty());
  workers.Down("host");
  REQUIRE(b->orders.size() == 1);
  CHECK(b->token() != token);
  workers.Withdraw(b.get());
  CHECK_FALSE(workers.Serves("host"));
  CHECK(workers.Views().empty());
}

TEST_CASE_METHOD(Fixture, "the next client is asked at once when no worker had attached") {
  workers.Offer(a, "actor 0", "host");
  workers.Offer(b, "actor 1", "host");
  workers.Withdraw(a.get());
  CHECK(b->orders.size() == 1);
}

TEST_CASE_METHOD(Fixture, "a worker that dies is its owner's to start again") {
  workers.Offer(a, "actor 0", "host");
  workers.Offer(b, "actor 1", "host");
  workers.Up("host", 71);
  CHECK(workers.Views().front().pid == 71);
  workers.Down("host");
  workers.Ended(a.get(), "host", "signal 9", false);
  CHECK(b->orders.empty());
  CHECK(workers.Owner("host", a->token()) == a);
  CHECK(restarts == std::vector<std::string>{"host"});
  const SpawnedWorkers::View view = workers.Views().front();
  CHECK((view.owner == "actor 0" && view.restarts == 1 && view.last_exit == "signal 9"));
  CHECK_FALSE(view.attached);
  workers.Ended(b.get(), "host", "signal 9", true);  // not the owner
  CHECK(b->orders.empty());
}

TEST_CASE_METHOD(Fixture, "a client that gives up is asked again only when it registers again") {
  workers.Offer(a, "actor 0", "host");
  workers.Ended(a.get(), "host", "exit code 1", true);
  CHECK(a->orders.size() == 1);
  CHECK_FALSE(workers.Serves("host"));
  workers.Offer(b, "actor 1", "host");
  CHECK(b->orders.size() == 1);
  workers.Ended(b.get(), "host", "exit code 1", true);
  CHECK_FALSE(workers.Serves("host"));
  workers.Offer(a, "actor 0", "host");
  CHECK(a->orders.size() == 2);
}

TEST_CASE_METHOD(Fixture, "a client whose memory moves to another device stops its first worker") {
  workers.Offer(a, "actor 0", "host");
  workers.Offer(b, "actor 1", "host");
  workers.Up("host", 71);
  workers.Offer(a, "actor 0", "host.1");
  CHECK(a->stops == std::vector<std::string>{"host"});
  CHECK(a->orders.back().device == "host.1");
  CHECK(b->orders.empty());
  workers.Down("host");
  CHECK(b->orders.size() == 1);
}

TEST_CASE_METHOD(Fixture, "devices that no client serves are left alone") {
  workers.Up("host", 71);
  workers.Down("host");
  workers.Ended(a.get(), "host", "signal 9", true);
  workers.Withdraw(a.get());
  CHECK(workers.Views().empty());
}

}  // namespace weightd
