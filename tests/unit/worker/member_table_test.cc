#include "daemon/worker/member_table.h"

#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>

#include "daemon/wire/convert.h"
#include "tests/unit/worker/worker_testing.h"

namespace weightd {
namespace {

using testing::FakeClient;
using testing::MakeBinding;
using testing::ReasonOf;
using testing::Reports;
using testing::SharedBuffer;
using testing::TempDir;

constexpr char kToken[] = "secret";

/// A table with one expected member.
struct Fixture {
  explicit Fixture(bool writable = true, milliseconds attach_deadline = testing::kPatience) {
    StatusOr<std::unique_ptr<MemberTable>> created = MemberTable::Create(
        {.socket_path = path, .check_peer = true, .attach_deadline = attach_deadline},
        [this](v1::WorkerReport report) { reports.Add(std::move(report)); });
    REQUIRE(created.ok());
    table = *std::move(created);
    Expect(1, writable);
  }
  void Expect(uint64_t member, bool writable = true) {
    v1::ExpectMember expect;
    expect.set_member(member);
    expect.set_token(kToken);
    expect.set_writable(writable);
    expect.set_label("engine e0 tp 0");
    table->Expect(expect);
  }
  /// A client of member 1 with one registered segment.
  std::unique_ptr<FakeClient> Register(const SharedBuffer& buffer) {
    auto client = std::make_unique<FakeClient>(path, 1, kToken);
    REQUIRE(client->Next().has_attached());
    client->Offer(0, buffer);
    client->Bind({MakeBinding(0, 0, 0, {4}, v1::DTYPE_FLOAT32)});
    REQUIRE(client->Next().has_ready());
    REQUIRE(reports.TakeAttached(1).has_value());
    return client;
  }

  TempDir dir;
  const std::string path = dir.path("worker.sock");
  Reports reports;
  std::unique_ptr<MemberTable> table;
};

TEST_CASE("a client attaches, lends memory and is reported") {
  Fixture fixture;
  const SharedBuffer buffer(4096);
  FakeClient client(fixture.path, 1, kToken);
  const v1::DataFrame attached = client.Next();
  REQUIRE(attached.has_attached());
  CHECK(attached.attached().ring_bytes() == 0);
  client.Offer(0, buffer);
  client.Bind({MakeBinding(0, 0, 0, {1024}, v1::DTYPE_FLOAT32)});
  const v1::DataFrame ready = client.Next();
  REQUIRE(ready.has_ready());
  CHECK(ready.ready().mapped_bytes() == 4096);
  const auto report = fixture.reports.TakeAttached(1);
  REQUIRE(report.has_value());
  CHECK(report->error().code() == 0);
  CHECK(report->mapped_bytes() == 4096);
}

TEST_CASE("a client that wants a ring gets its descriptor") {
  Fixture fixture(false);
  FakeClient client(fixture.path, 1, kToken, true);
  const v1::DataFrame attached = client.Next();
  REQUIRE(attached.has_attached());
  CHECK(attached.attached().ring_bytes() == kRingBytes);
  CHECK(attached.attached().ring_slots() == kRingSlots);
  REQUIRE(client.fds().size() == 1);
  struct stat info {};
  REQUIRE(::fstat(client.fds()[0].get(), &info) == 0);
  CHECK(static_cast<uint64_t>(info.st_size) == kRingBytes);
}

TEST_CASE("a wrong token is refused at once and reports nothing") {
  Fixture fixture;
  FakeClient client(fixture.path, 1, "guess");
  const v1::DataFrame refused = client.Next();
  REQUIRE(refused.has_refused());
  CHECK(refused.refused().error().reason() == reason::kFenced);
  CHECK(client.WaitEnd());
  CHECK(fixture.reports.size() == 0);
}

TEST_CASE("a client that comes before the daemon's word waits for it") {
  Fixture fixture;
  FakeClient client(fixture.path, 2, kToken);
  fixture.Expect(2);
  CHECK(client.Next().has_attached());
}

TEST_CASE("a client that nobody announces is refused at its deadline") {
  Fixture fixture(true, milliseconds(1));
  FakeClient client(fixture.path, 99, kToken);
  const v1::DataFrame refused = client.Next();
  REQUIRE(refused.has_refused());
  CHECK(refused.refused().error().reason() == reason::kFenced);
  CHECK(client.WaitEnd());
}

TEST_CASE("garbage on the socket ends that connection and no other") {
  Fixture fixture;
  const SharedBuffer buffer(4096);
  const auto good = fixture.Register(buffer);
  StatusOr<DataChannel> bad = DataChannel::Connect(fixture.path, testing::Soon());
  REQUIRE(bad.ok());
  REQUIRE(::send(bad->fd(), "GET / HTTP/1.1\r\n\r\n", 18, 0) == 18);
  while (bad->Receive(testing::Soon()).ok()) continue;
  good->Bind({MakeBinding(0, 0, 0, {8}, v1::DTYPE_FLOAT32)});
  CHECK(good->Next().has_ready());
}

TEST_CASE("a refused registration is answered once and leaves the earlier one in force") {
  Fixture fixture;
  const SharedBuffer buffer(4096);
  const auto client = fixture.Register(buffer);
  const SharedBuffer small(16);
  client->Offer(1, small, 4096);  // smaller than claimed
  client->Bind({MakeBinding(0, 1, 0, {4}, v1::DTYPE_FLOAT32)}, false);
  client->Bind({MakeBinding(1, 1, 0, {4}, v1::DTYPE_FLOAT32)});
  const v1::DataFrame refused = client->Next();
  REQUIRE(refused.has_refused());
  CHECK(refused.refused().error().reason() == reason::kSharedMemory);
  CHECK(refused.refused().error().rank() == "engine e0 tp 0");
  CHECK_FALSE(refused.refused().error().remedy().empty());
  const auto report = fixture.reports.TakeAttached(1);
  REQUIRE(report.has_value());
  CHECK(ReasonOf(report->error()) == reason::kSharedMemory);

  std::atomic<bool> cancelled{false};
  PinnedMembers pinned;
  REQUIRE(fixture.table->Pin(std::array<uint64_t, 1>{1}, &cancelled, &pinned).ok());
  CHECK(pinned.Find(1)->memory->Find(0, 0) != nullptr);
  client->Bind({MakeBinding(0, 0, 0, {4}, v1::DTYPE_FLOAT32)});
  CHECK(client->Next().has_ready());
}

TEST_CASE("out-of-bounds memory is refused with the sizes") {
  Fixture fixture;
  const SharedBuffer buffer(4096);
  FakeClient client(fixture.path, 1, kToken);
  REQUIRE(client.Next().has_attached());
  client.Offer(0, buffer);
  client.Bind({MakeBinding(5, 0, 4000, {1024}, v1::DTYPE_FLOAT32)});
  const v1::DataFrame refused = client.Next();
  REQUIRE(refused.has_refused());
  CHECK(refused.refused().error().reason() == reason::kShape);
  CHECK(refused.refused().error().tensor() == "index 5 box 0");
  CHECK(refused.refused().error().message().find("4096") != std::string::npos);
}

TEST_CASE("the end of a client's connection is reported, and it may come back") {
  Fixture fixture;
  const SharedBuffer buffer(4096);
  auto client = fixture.Register(buffer);
  client.reset();
  const auto lost = fixture.reports.TakeLost(1);
  REQUIRE(lost.has_value());
  CHECK_FALSE(lost->cause().empty());
  fixture.Register(buffer);
}

TEST_CASE("a second connection of the same client replaces the first") {
  Fixture fixture;
  const SharedBuffer buffer(4096);
  const auto first = fixture.Register(buffer);
  FakeClient second(fixture.path, 1, kToken);
  CHECK(second.Next().has_attached());
  CHECK(first->WaitEnd());
  CHECK(fixture.reports.TakeLost(1).has_value());
}

TEST_CASE("a death is seen although a forked child keeps the socket open") {
  Fixture fixture;
  const pid_t child = ::fork();
  if (child == 0) {
    FakeClient client(fixture.path, 1, kToken);
    client.Next();
    if (::fork() == 0) {  // inherits the connection and outlives its owner
      while (::getppid() != 1 && ::poll(nullptr, 0, 5) == 0) continue;
      ::poll(nullptr, 0, 2000);
      ::_exit(0);
    }
    ::raise(SIGKILL);
  }
  const auto lost = fixture.reports.TakeLost(1);
  REQUIRE(lost.has_value());
  CHECK(lost->cause() == "process exited");
  ::waitpid(child, nullptr, 0);
}

TEST_CASE("memory that a step uses outlives its client until the step ends") {
  Fixture fixture;
  const SharedBuffer buffer(4096);
  buffer.as<float>()[0] = 3.5f;
  auto client = fixture.Register(buffer);
  std::atomic<bool> cancelled{false};
  auto pinned = std::make_unique<PinnedMembers>();
  REQUIRE(fixture.table->Pin(std::array<uint64_t, 1>{1}, &cancelled, pinned.get()).ok());
  REQUIRE(pinned->lost().ok());
  fixture.table->Forget(1);
  for (const auto end = testing::Soon(); !cancelled.load() && Clock::now() < end;)
    ::poll(nullptr, 0, 1);
  CHECK(ReasonOf(pinned->lost()) == reason::kPeerLost);
  CHECK(FieldsOf(pinned->lost()).peer == "engine e0 tp 0");
  CHECK(fixture.reports.size() == 0);  // not before the fence
  CHECK(*reinterpret_cast<float*>(pinned->Find(1)->memory->Find(0, 0)->binding.base) == 3.5f);
  pinned.reset();
  CHECK(fixture.reports.TakeLost(1).has_value());
  CHECK(client->WaitEnd());
  CHECK(fixture.reports.size() == 0);  // exactly one
}

TEST_CASE("forgetting confirms also what was never attached, and revokes the token") {
  Fixture fixture;
  fixture.table->Forget(1);
  CHECK(fixture.reports.TakeLost(1).has_value());
  std::atomic<bool> cancelled{false};
  PinnedMembers pinned;
  CHECK(ReasonOf(fixture.table->Pin(std::array<uint64_t, 1>{1}, &cancelled, &pinned)) ==
        reason::kPeerLost);
}

TEST_CASE("a step cannot use a client that has registered nothing") {
  Fixture fixture;
  FakeClient client(fixture.path, 1, kToken);
  REQUIRE(client.Next().has_attached());
  std::atomic<bool> cancelled{false};
  PinnedMembers pinned;
  const Status status = fixture.table->Pin(std::array<uint64_t, 1>{1}, &cancelled, &pinned);
  CHECK(ReasonOf(status) == reason::kPeerLost);
  CHECK(FieldsOf(status).peer == "engine e0 tp 0");
}

TEST_CASE("the socket is the owner's alone, replaces a stale one and is removed") {
  TempDir dir;
  const std::string path = dir.path("worker.sock");
  const auto ignore = [](v1::WorkerReport) {};
  {
    const auto table = MemberTable::Create({.socket_path = path}, ignore);
    REQUIRE(table.ok());
    struct stat info {};
    REQUIRE(::stat(path.c_str(), &info) == 0);
    CHECK((info.st_mode & 0777) == 0600);
    const Status in_use = MemberTable::Create({.socket_path = path}, ignore).status();
    CHECK(ReasonOf(in_use) == reason::kSocket);
    CHECK(Message(in_use).find(path) != std::string::npos);
  }
  CHECK_FALSE(std::filesystem::exists(path));
  const pid_t child = ::fork();
  if (child == 0) {  // leaves its socket behind
    const auto listener = DataListener::Create(path);
    ::_exit(listener.ok() ? 0 : 1);
  }
  int status = -1;
  ::waitpid(child, &status, 0);
  REQUIRE(status == 0);
  REQUIRE(std::filesystem::exists(path));
  CHECK(MemberTable::Create({.socket_path = path}, ignore).ok());
  std::ofstream(path) << "not a socket";
  CHECK(ReasonOf(MemberTable::Create({.socket_path = path}, ignore).status()) == reason::kSocket);
  CHECK(ReasonOf(MemberTable::Create({.socket_path = std::string(150, 'x')}, ignore).status()) ==
        reason::kSocket);
}

}  // namespace
}  // namespace weightd
