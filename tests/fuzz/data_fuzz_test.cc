// The worker's data socket and its plans: awkward frames, mutated frames and noise end their own
// connection and touch nobody's memory; a plan whose pages were disturbed is refused or harmless.
#include <sys/socket.h>

#include <catch2/catch.hpp>

#include "daemon/worker/member_table.h"
#include "tests/fuzz/mutator.h"
#include "tests/unit/worker/worker_testing.h"

namespace weightd {
namespace {

using fuzz::Mutator;
using testing::FakeClient;
using testing::SharedBuffer;

constexpr int kRounds = 300;
constexpr char kToken[] = "secret";
const std::vector<std::string> kWords = {"", kToken, "FENCED"};

struct Fixture {
  testing::TempDir folder;
  testing::Reports reports;
  std::unique_ptr<MemberTable> table;

  Fixture() {
    MemberTable::Options options;
    options.socket_path = folder.path("worker.sock");
    auto created = MemberTable::Create(
        options, [this](v1::WorkerReport report) { reports.Add(std::move(report)); });
    REQUIRE(created.ok());
    table = *std::move(created);
  }
  std::string path() const { return folder.path("worker.sock"); }
  void Expect(uint64_t member) const {
    v1::ExpectMember expect;
    expect.set_member(member);
    expect.set_token(kToken);
    expect.set_label("engine e0 tp 0");
    expect.set_writable(true);
    table->Expect(expect);
  }
  /// A client that does everything right is served. Like the client library it comes again when it
  /// is turned away: too many that say nothing may be in front of it.
  void CheckServes(uint64_t member) const {
    Expect(member);
    const SharedBuffer buffer(4096);
    auto good = std::make_unique<FakeClient>(path(), member, kToken);
    const Clock::time_point deadline = testing::Soon();
    while (!good->Next().has_attached()) {
      REQUIRE(Clock::now() < deadline);
      good = std::make_unique<FakeClient>(path(), member, kToken);
    }
    good->Offer(0, buffer);
    good->Bind({testing::MakeBinding(0, 0, 0, {8}, v1::DTYPE_FLOAT32)});
    REQUIRE(good->Next().has_ready());
  }
};

TEST_CASE("clients with awkward frames disturb nobody") {
  Fixture fixture;
  Mutator draw(11);
  const SharedBuffer buffer(4096);
  for (uint64_t round = 1; round <= kRounds; ++round) {
    fixture.Expect(round);
    FakeClient client(fixture.path(), round, kToken, draw.Chance(20));
    REQUIRE(client.Next().has_attached());
    for (int64_t frames = draw.Number(1, 5); frames > 0; --frames) {
      v1::DataFrame frame;
      draw.Fill(&frame, kWords);
      if (draw.Chance(40)) frame.mutable_bind()->set_last(true);
      std::vector<int> fds(static_cast<size_t>(draw.Chance(50) ? draw.Number(0, 3) : 0),
                           buffer.fd());
      if (!client.channel().Send(frame, testing::Soon(), fds).ok()) break;
    }
    client.channel().Shutdown();
    REQUIRE(client.WaitEnd());
  }
  fixture.CheckServes(kRounds + 1);
}

TEST_CASE("a registration that is right but for one field is refused or harmless") {
  Fixture fixture;
  Mutator draw(12);
  for (uint64_t round = 1; round <= kRounds; ++round) {
    fixture.Expect(round);
    const SharedBuffer buffer(4096);
    FakeClient client(fixture.path(), round, kToken);
    REQUIRE(client.Next().has_attached());
    v1::DataFrame offer;
    v1::Segment* segment = offer.mutable_segments()->add_segments();
    segment->set_size_bytes(4096);
    v1::DataFrame bind;
    *bind.mutable_bind()->add_bindings() =
        testing::MakeBinding(0, 0, 128, {4, 8}, v1::DTYPE_FLOAT32);
    draw.Disturb(draw.Chance(30) ? &offer : &bind, kWords);
    if (offer.has_segments()) {
      (void)client.channel().Send(offer, testing::Soon(), {buffer.fd()});
    }
    bind.mutable_bind()->set_last(true);
    (void)client.channel().Send(bind, testing::Soon());
    const v1::DataFrame answer = client.Next();
    REQUIRE((answer.has_ready() || answer.has_refused()));
    if (answer.has_refused()) CHECK_FALSE(answer.refused().error().remedy().empty());
  }
  fixture.CheckServes(kRounds + 1);
}

TEST_CASE("mutated bytes on the data socket end their own connection") {
  Fixture fixture;
  Mutator draw(13);
  for (int round = 0; round < kRounds; ++round) {
    v1::DataFrame frame;
    frame.mutable_attach()->set_member(static_cast<uint64_t>(round));
    frame.mutable_attach()->set_token(kToken);
    const std::string body = frame.SerializeAsString();
    std::string bytes(4, '\0');
    bytes[0] = static_cast<char>(body.size());
    bytes = draw.Mutate(bytes + body);
    auto channel = DataChannel::Connect(fixture.path(), testing::Soon());
    REQUIRE(channel.ok());
    [[maybe_unused]] const ssize_t sent =
        ::send(channel->fd(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
    channel->Shutdown();
  }
  fixture.CheckServes(kRounds + 1);
}

TEST_CASE("a plan whose pages were disturbed is refused or proven") {
  Mutator draw(14);
  int refused = 0;
  for (int round = 0; round < kRounds; ++round) {
    std::vector<v1::PlanPage> pages = testing::PagesOf(testing::SmallPlan(), 1);
    const auto last = static_cast<int64_t>(pages.size()) - 1;
    draw.Disturb(&pages[static_cast<size_t>(draw.Number(0, last))], kWords);
    PlanAssembler assembler;
    Status status;
    for (const v1::PlanPage& page : pages) {
      if (status.ok()) status = assembler.Add(page);
    }
    if (status.ok()) {
      StatusOr<PlanInput> input = assembler.Finish();
      status = input.ok() ? LoadPlan(*std::move(input)).status() : input.status();
    }
    refused += status.ok() ? 0 : 1;
  }
  CHECK(refused > kRounds / 4);
}

}  // namespace
}  // namespace weightd
