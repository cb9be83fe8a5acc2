#include "daemon/worker/catch_up.h"

#include <catch2/catch.hpp>
#include <numeric>
#include <string>
#include <vector>

#include "tests/unit/worker/worker_testing.h"

namespace weightd {
namespace {

using testing::ReasonOf;

/// Two raw parameters, one of them transposed in memory, an alias and an opaque one.
RankLayout MakeLayout() {
  RankLayout layout;
  layout.params = {{"a", {3, 5}, DType::kFloat32},
                   {"b", {7}, DType::kBFloat16},
                   {"tied", {3, 5}, DType::kFloat32, ParamKind::kRaw, "a"},
                   {"scratch", {4}, DType::kFloat32, ParamKind::kOpaque}};
  return layout;
}

struct Rank {
  explicit Rank(bool transposed) {
    bindings = {{.base = reinterpret_cast<std::byte*>(a.data()),
                 .strides = transposed ? Dims{1, 3} : Dims{5, 1}},
                {.base = reinterpret_cast<std::byte*>(b.data()), .strides = Dims{1}},
                {},
                {}};
  }
  float A(int row, int column) const {
    const Dims& strides = bindings[0].strides;
    return a[static_cast<size_t>(row * strides[0] + column * strides[1])];
  }
  std::vector<float> a = std::vector<float>(15);
  std::vector<uint16_t> b = std::vector<uint16_t>(7);
  std::vector<Binding> bindings;
};

TEST_CASE("parameters are copied whatever their strides; aliases and opaque ones are left alone") {
  Rank peer(false);
  Rank late(true);
  std::iota(peer.a.begin(), peer.a.end(), 1.0f);
  std::iota(peer.b.begin(), peer.b.end(), uint16_t{0x7fbe});  // NaN payloads among them
  CatchUp catch_up(1);
  uint64_t copied = 0;
  const RankLayout layout = MakeLayout();
  REQUIRE(catch_up
              .Copy(layout, peer.bindings, late.bindings,
                    {.on_bytes = [&copied](uint64_t bytes) { copied = bytes; }})
              .ok());
  for (int row = 0; row < 3; ++row) {
    for (int column = 0; column < 5; ++column) CHECK(late.A(row, column) == peer.A(row, column));
  }
  CHECK(late.b == peer.b);
  CHECK(copied == ParamBytes(layout));
  CHECK(copied == 15 * 4 + 7 * 2);
}

TEST_CASE("a cancelled or late copy stops before it writes") {
  Rank peer(false);
  Rank late(false);
  peer.a[0] = 1.0f;
  CatchUp catch_up(1);
  const std::atomic<bool> cancelled{true};
  CHECK(ReasonOf(catch_up.Copy(MakeLayout(), peer.bindings, late.bindings,
                               {.cancelled = &cancelled})) == reason::kCancelled);
  CHECK(ReasonOf(catch_up.Copy(MakeLayout(), peer.bindings, late.bindings,
                               {.deadline = Clock::time_point::min()})) == reason::kDeadline);
  CHECK(late.a[0] == 0.0f);
}

TEST_CASE("a derived parameter's lent memory is copied as it was transferred") {
  Rank peer(false);
  Rank late(false);
  RankLayout layout = MakeLayout();
  layout.params[0].kind = ParamKind::kDerived;
  layout.params[2].kind = ParamKind::kDerived;
  std::iota(peer.a.begin(), peer.a.end(), 1.0f);
  CatchUp catch_up(1);
  REQUIRE(catch_up.Copy(layout, peer.bindings, late.bindings, {}).ok());
  CHECK(late.a == peer.a);
  REQUIRE(catch_up.Retain("e", 5, layout, peer.bindings, {}).ok());
  Rank later(false);
  REQUIRE(catch_up.Restore("e", 5, layout, later.bindings, {}).ok());
  CHECK(later.a == peer.a);
}

TEST_CASE("a retained copy fills the rank it was taken from, until it is dropped") {
  const RankLayout layout = MakeLayout();
  const std::string label = "engine e0 tp 0";
  Rank before(false);
  Rank after(true);
  std::iota(before.a.begin(), before.a.end(), 1.0f);
  CatchUp catch_up(2);
  REQUIRE(catch_up.Retain(label, 5, layout, before.bindings, {}).ok());
  before.a[0] = 99.0f;  // the copy is of then, not of now
  CHECK(ReasonOf(catch_up.Restore(label, 4, layout, after.bindings, {})) == reason::kNoPlan);
  CHECK(ReasonOf(catch_up.Restore("engine e1 tp 0", 5, layout, after.bindings, {})) ==
        reason::kNoPlan);
  RankLayout other = layout;
  other.params[1].dtype = DType::kFloat16;
  CHECK(ReasonOf(catch_up.Restore(label, 5, other, after.bindings, {})) == reason::kNoPlan);
  REQUIRE(catch_up.Restore(label, 5, layout, after.bindings, {}).ok());
  CHECK(after.A(0, 0) == 1.0f);
  CHECK(after.A(2, 4) == 15.0f);

  catch_up.DropRetained(5);
  CHECK(catch_up.Restore(label, 5, layout, after.bindings, {}).ok());
  REQUIRE(catch_up.Retain(label, 6, layout, before.bindings, {}).ok());
  CHECK(ReasonOf(catch_up.Restore(label, 5, layout, after.bindings, {})) == reason::kNoPlan);
  catch_up.DropRetained(7);
  CHECK(ReasonOf(catch_up.Restore(label, 6, layout, after.bindings, {})) == reason::kNoPlan);
}

TEST_CASE("a copy that was interrupted is not restored") {
  const RankLayout layout = MakeLayout();
  Rank rank(false);
  CatchUp catch_up(1);
  REQUIRE(catch_up.Retain("e", 5, layout, rank.bindings, {}).ok());
  const std::atomic<bool> cancelled{true};
  REQUIRE_FALSE(catch_up.Retain("e", 6, layout, rank.bindings, {.cancelled = &cancelled}).ok());
  CHECK(ReasonOf(catch_up.Restore("e", 5, layout, rank.bindings, {})) == reason::kNoPlan);
  CHECK(ReasonOf(catch_up.Restore("e", 6, layout, rank.bindings, {})) == reason::kNoPlan);
}

}  // namespace
}  // namespace weightd
