#include "daemon/transport/shm/shm_transport.h"

#include <atomic>
#include <catch2/catch.hpp>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "daemon/base/status.h"
#include "tests/unit/transport/plan_fixture.h"

namespace weightd {
namespace {

using testing::PlanFixture;

// Merged qkv with a transposed, a padded, a stacked, an aliased and an opaque parameter.
std::unique_ptr<PlanFixture> MakeFixture(uint32_t copies_per_window) {
  auto fixture = std::make_unique<PlanFixture>(3);
  const uint32_t q = fixture->AddTensor("q_proj", {48, 40});
  const uint32_t k = fixture->AddTensor("k_proj", {24, 40});
  const uint32_t conv = fixture->AddTensor("conv1d", {70, 90});
  const uint32_t embed = fixture->AddTensor("embed", {33, 40});
  const uint32_t expert = fixture->AddTensor("expert", {8, 12});
  const uint32_t norm = fixture->AddTensor("norm", {4000});
  const uint32_t qkv_param = fixture->AddParam("qkv", {36, 40});
  const uint32_t conv_param = fixture->AddParam("conv1d_t", {90, 70});
  const uint32_t embed_param = fixture->AddParam("embed", {40, 40});
  const uint32_t stack_param = fixture->AddParam("experts", {2, 12, 8});
  const uint32_t norm_param = fixture->AddParam("norm", {4000});
  fixture->AddParam("head", {40, 40}, ParamKind::kRaw, "embed");
  fixture->AddParam("cache", {16}, ParamKind::kOpaque);
  fixture->AddWrite(q, {{24, 0}, {24, 40}}, qkv_param, {0, 0}, {0, 1});
  fixture->AddWrite(k, {{12, 0}, {12, 40}}, qkv_param, {24, 0}, {0, 1});
  fixture->AddWrite(conv, {{0, 0}, {70, 90}}, conv_param, {0, 0}, {1, 0});
  fixture->AddWrite(embed, {{0, 0}, {33, 40}}, embed_param, {0, 0}, {0, 1});
  fixture->AddZeroFill(embed_param, {{33, 0}, {7, 40}});
  fixture->AddWrite(expert, {{0, 0}, {8, 12}}, stack_param, {0, 0, 0}, {-1, 1, 0});
  fixture->AddZeroFill(stack_param, {{1, 0, 0}, {1, 12, 8}});
  fixture->AddWrite(norm, {{0}, {4000}}, norm_param, {0}, {0});
  fixture->Finish(copies_per_window);
  return fixture;
}

ShmTransport MakeTransport(int num_threads, host::Isa isa) {
  ShmOptions options;
  options.num_threads = num_threads;
  options.kernels = &host::KernelsFor(isa);
  return ShmTransport(options);
}

// Copies parts of a fixture's shards into one buffer, as a client's ring would.
class FakeRing : public StagedSource {
 public:
  FakeRing(PlanFixture& fixture, uint64_t max_part_bytes)
      : fixture_(fixture), max_part_bytes_(max_part_bytes) {}

  uint64_t max_part_bytes() const override { return max_part_bytes_; }

  StatusOr<const std::byte*> Fetch(uint32_t rank, uint32_t tensor, uint32_t shard,
                                   const Box& part) override {
    if (shard != 0) return Error(StatusCode::kInternal, "", "", "no such shard");
    ++fetches;
    if (fetches == fail_at) {
      return Error(StatusCode::kUnavailable, reason::kPeerLost, "", "actor {} is gone", rank);
    }
    largest = std::max(largest, static_cast<uint64_t>(part.num_elements()) * 4);
    const Dims strides = RowMajorStrides(fixture_.Held(rank, tensor).extent);
    const std::vector<uint32_t>& memory = fixture_.shard_memory(rank, tensor);
    buffer_.assign(static_cast<size_t>(part.num_elements()), 0);
    for (int64_t n = 0; n < part.num_elements(); ++n) {
      int64_t rest = n, at = 0;
      for (int d = part.num_dims() - 1; d >= 0; --d) {
        at += (part.origin[d] + rest % part.extent[d]) * strides[d];
        rest /= part.extent[d];
      }
      buffer_[static_cast<size_t>(n)] = memory[static_cast<size_t>(at)];
    }
    return reinterpret_cast<const std::byte*>(buffer_.data());
  }

  int fetches = 0;
  int fail_at = -1;
  uint64_t largest = 0;

 private:
  PlanFixture& fixture_;
  uint64_t max_part_bytes_;
  std::vector<uint32_t> buffer_;
};

}  // namespace

TEST_CASE("every parameter holds what the layout says, bit for bit, and the digests agree") {
  for (const host::Isa isa : {host::Isa::kPortable, host::Isa::kAvx2, host::Isa::kAvx512}) {
    if (!host::Supported(isa)) continue;
    for (const int threads : {1, 2, 4}) {
      for (const uint32_t copies : {1U, 3U, 100U}) {
        auto fixture = MakeFixture(copies);
        ShmTransport transport = MakeTransport(threads, isa);
        RunControl control;
        const auto sent = transport.Transfer(fixture->plan(), 0, control);
        REQUIRE(sent.ok());
        const auto landed = transport.Verify(fixture->plan(), 0, control);
        REQUIRE(landed.ok());
        CHECK(fixture->params() == fixture->Expected());
        CHECK(*sent == *landed);
        CHECK(sent->tensors == std::vector<uint32_t>{0, 1, 2, 3, 4, 5});
        CHECK(sent->words.size() == 7);
        CHECK(sent->words.back() == 7 * 40 + 12 * 8);
      }
    }
  }
}

TEST_CASE("digests do not depend on threads, windows or instruction set") {
  auto first = MakeFixture(100);
  ShmTransport one = MakeTransport(1, host::Isa::kPortable);
  RunControl control;
  const auto expected = one.Transfer(first->plan(), 0, control);
  REQUIRE(expected.ok());
  auto second = MakeFixture(2);
  ShmTransport other{ShmOptions{3}};
  const auto got = other.Transfer(second->plan(), 0, control);
  REQUIRE(got.ok());
  CHECK(*expected == *got);
}

TEST_CASE("aliased and opaque parameters are never touched") {
  auto fixture = MakeFixture(100);
  ShmTransport transport;
  RunControl control;
  REQUIRE(transport.Transfer(fixture->plan(), 0, control).ok());
  for (const size_t param : {size_t{5}, size_t{6}}) {
    for (const uint16_t value : fixture->params()[param]) CHECK(value == 0x5a5a);
  }
}

TEST_CASE("verify sees a changed element, a swap and a nonzero fill") {
  auto fixture = MakeFixture(100);
  ShmTransport transport;
  RunControl control;
  const auto sent = transport.Transfer(fixture->plan(), 0, control);
  REQUIRE(sent.ok());
  const auto differs = [&](size_t word) {
    const auto landed = transport.Verify(fixture->plan(), 0, control);
    REQUIRE(landed.ok());
    return landed->words[word] != sent->words[word];
  };
  CHECK_FALSE(differs(0));
  auto& qkv = fixture->params()[0];
  qkv[3] ^= 1;
  CHECK(differs(0));
  qkv[3] ^= 1;
  std::swap(qkv[0], qkv[1]);
  CHECK(differs(0));
  std::swap(qkv[0], qkv[1]);
  std::swap(qkv[0], qkv[40 * 24]);  // q against k
  CHECK(differs(0));
  CHECK(differs(1));
  std::swap(qkv[0], qkv[40 * 24]);
  fixture->params()[2][40 * 39] = 0x8000;  // minus zero is not zero
  CHECK(differs(6));
  fixture->params()[2][40 * 39] = 0;
  for (size_t word = 0; word < 7; ++word) CHECK_FALSE(differs(word));
}

TEST_CASE("verify follows the layout, so a copy that the plan lacks is noticed") {
  auto fixture = MakeFixture(1);
  fixture->rank_plan().windows.erase(fixture->rank_plan().windows.begin());
  ShmTransport transport;
  RunControl control;
  const auto sent = transport.Transfer(fixture->plan(), 0, control);
  const auto landed = transport.Verify(fixture->plan(), 0, control);
  REQUIRE((sent.ok() && landed.ok()));
  CHECK(sent->words[0] != landed->words[0]);
}

TEST_CASE("staged shards arrive part by part and are bounded") {
  auto mapped = MakeFixture(100);
  ShmTransport transport;
  RunControl control;
  const auto expected = transport.Transfer(mapped->plan(), 0, control);
  REQUIRE(expected.ok());
  for (const uint64_t part_bytes : {4U, 100U, 360U, 5000U, 1U << 20}) {
    auto fixture = MakeFixture(100);
    for (uint32_t r = 0; r < fixture->num_ranks(); ++r) {
      for (const uint32_t tensor : {1U, 2U, 4U}) fixture->Stage(r, tensor);
    }
    FakeRing ring(*fixture, part_bytes);
    control.staged = &ring;
    const auto sent = transport.Transfer(fixture->plan(), 0, control);
    REQUIRE(sent.ok());
    CHECK(ring.largest <= part_bytes);
    CHECK(fixture->params() == fixture->Expected());
    CHECK(*sent == *expected);
  }
}

TEST_CASE("a staged shard without a stager, or with a lost one, is an error that names it") {
  auto fixture = MakeFixture(100);
  fixture->Stage(1, 2);
  ShmTransport transport;
  RunControl control;
  const auto none = transport.Transfer(fixture->plan(), 0, control);
  CHECK(none.status().code() == StatusCode::kFailedPrecondition);
  CHECK(FieldsOf(none.status()).tensor == "conv1d");
  FakeRing ring(*fixture, 256);
  ring.fail_at = 3;
  control.staged = &ring;
  const auto lost = transport.Transfer(fixture->plan(), 0, control);
  CHECK(lost.status().code() == StatusCode::kUnavailable);
  CHECK(FieldsOf(lost.status()).reason == reason::kPeerLost);
  CHECK(FieldsOf(lost.status()).tensor == "conv1d");
  CHECK(FieldsOf(lost.status()).phase == "transfer");
}

TEST_CASE("cancel and deadline end a step at the next window") {
  auto fixture = MakeFixture(1);
  ShmTransport transport;
  std::atomic<bool> cancelled{false};
  RunControl control;
  control.cancelled = &cancelled;
  uint32_t done = 0;
  control.on_window = [&](uint32_t windows, uint64_t, const std::string&) {
    done = windows;
    if (windows == 2) cancelled = true;
  };
  const auto stopped = transport.Transfer(fixture->plan(), 0, control);
  CHECK(stopped.status().code() == StatusCode::kCancelled);
  CHECK(FieldsOf(stopped.status()).peer == "engine e0 tp 0");
  CHECK(done == 2);
  cancelled = false;
  control.on_window = nullptr;
  control.deadline = Clock::now() - milliseconds(1);
  for (const bool verify : {false, true}) {
    const auto late = verify ? transport.Verify(fixture->plan(), 0, control)
                             : transport.Transfer(fixture->plan(), 0, control);
    CHECK(late.status().code() == StatusCode::kDeadlineExceeded);
    CHECK(FieldsOf(late.status()).reason == reason::kDeadline);
    CHECK(FieldsOf(late.status()).phase == (verify ? "verify" : "transfer"));
    CHECK(FieldsOf(late.status()).tensor == "qkv");
  }
}

TEST_CASE("windows are reported in order with the bytes that landed") {
  auto fixture = MakeFixture(4);
  ShmTransport transport;
  RunControl control;
  std::vector<uint64_t> bytes;
  std::string next = "unset";
  control.on_window = [&](uint32_t windows, uint64_t landed, const std::string& param) {
    CHECK(windows == bytes.size() + 1);
    bytes.push_back(landed);
    next = param;
  };
  REQUIRE(transport.Transfer(fixture->plan(), 0, control).ok());
  CHECK(bytes.size() == fixture->rank_plan().windows.size());
  CHECK(bytes.back() == fixture->rank_plan().bytes);
  CHECK(next.empty());
}

TEST_CASE("a window tells of which writes nothing is left") {
  auto fixture = MakeFixture(4);
  const RankPlan& plan = fixture->rank_plan();
  ShmTransport transport;
  RunControl control;
  std::vector<uint32_t> told;
  control.on_landed = [&](uint32_t target, uint32_t writes) {
    CHECK(target == 0);
    told.push_back(writes);
  };
  REQUIRE(transport.Transfer(fixture->plan(), 0, control).ok());
  REQUIRE(plan.windows.size() > 3);
  REQUIRE(told.size() == plan.windows.size());
  CHECK(told.back() == kAllLanded);
  for (size_t w = 0; w + 1 < told.size(); ++w) {
    uint32_t first = kAllLanded;
    for (uint32_t i = plan.windows[w].end; i < plan.copies.size(); ++i) {
      first = std::min(first, plan.copies[i].write);
    }
    CHECK(told[w] == first);
  }
}

TEST_CASE("a verification beside the transfer reads what has landed, and waits for the rest") {
  auto fixture = MakeFixture(4);
  ShmTransport transport, verifier;
  std::atomic<uint32_t> landed = 0;
  RunControl follows;
  follows.landed = &landed;
  uint32_t windows_verified = 0, landed_then = 0;
  follows.on_window = [&](uint32_t windows, uint64_t, const std::string&) {
    windows_verified = windows;
    landed_then = landed;
  };
  StatusOr<RankDigests> verified = RankDigests();
  std::jthread beside([&] { verified = verifier.Verify(fixture->plan(), 0, follows); });
  RunControl control;
  control.on_landed = [&](uint32_t, uint32_t writes) {
    std::this_thread::sleep_for(milliseconds(1));
    landed = writes;
  };
  const auto transferred = transport.Transfer(fixture->plan(), 0, control);
  beside.join();
  REQUIRE(transferred.ok());
  REQUIRE(verified.ok());
  CHECK(*verified == *transferred);
  CHECK(windows_verified == 1);  // the fixture is smaller than a window of Verify
  CHECK(landed_then == kAllLanded);
}

TEST_CASE("a verification that waits for bytes can be cancelled and has a deadline") {
  auto fixture = MakeFixture(4);
  std::atomic<uint32_t> landed = 1;
  std::atomic<bool> cancelled = true;
  for (const bool late : {false, true}) {
    RunControl control;
    control.landed = &landed;
    if (late) control.deadline = Clock::now() + milliseconds(5);
    if (!late) control.cancelled = &cancelled;
    const auto verified = ShmTransport().Verify(fixture->plan(), 0, control);
    REQUIRE_FALSE(verified.ok());
    CHECK(FieldsOf(verified.status()).reason == (late ? reason::kDeadline : reason::kCancelled));
    CHECK(FieldsOf(verified.status()).phase == "verify");
  }
}

TEST_CASE("memory that went away ends the step, even after the last window") {
  auto fixture = MakeFixture(100);
  ShmTransport transport;
  RunControl control;
  int checks = 0;
  control.check_memory = [&]() -> Status {
    if (++checks < 2) return absl::OkStatus();
    return Error(StatusCode::kUnavailable, reason::kMemoryMoved, "register again", "truncated");
  };
  REQUIRE(fixture->rank_plan().windows.size() == 1);
  const auto gone = transport.Transfer(fixture->plan(), 0, control);
  CHECK(FieldsOf(gone.status()).reason == reason::kMemoryMoved);
}

TEST_CASE("the digest of a shard is that of its own bits, mapped or staged") {
  auto fixture = MakeFixture(100);
  ShmTransport transport;
  RunControl control;
  const auto mapped = transport.DigestShard(fixture->plan(), 1, 2, 0, control);
  REQUIRE(mapped.ok());
  fixture->Stage(1, 2);
  FakeRing ring(*fixture, 500);
  control.staged = &ring;
  const auto staged = transport.DigestShard(fixture->plan(), 1, 2, 0, control);
  REQUIRE(staged.ok());
  CHECK(*mapped == *staged);
  fixture->shard_memory(1, 2)[17] ^= 0x80000000U;
  const auto changed = transport.DigestShard(fixture->plan(), 1, 2, 0, control);
  REQUIRE(changed.ok());
  CHECK(*changed != *mapped);
}

}  // namespace weightd
