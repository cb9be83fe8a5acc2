// A verification beside the transfer.
#include "tests/unit/worker/worker_fixture.h"

namespace weightd::testing {
namespace {

/// SmallPlan in windows of one copy.
PlanInput ManyWindows() {
  PlanInput plan = SmallPlan();
  plan.limits.operations = 1;
  const std::vector<const RankLayout*> layouts = {&plan.layouts[0]};
  const Digest128 digest = PlanDigest(plan.table, plan.shards, layouts, plan.limits);
  plan.digest.assign(digest.begin(), digest.end());
  return plan;
}

/// The attempt that a transfer and its verification share.
struct Both : WorkerFixture {
  Both() {
    AttachAll();
    REQUIRE_FALSE(Load(ManyWindows()).has_error());
    follows = true;
  }
  void StartBoth() {
    Start(v1::STEP_VERIFY);
    --attempts;
    Start(v1::STEP_TRANSFER);
  }
};

}  // namespace

TEST_CASE("a verification waits for what has not landed while another step runs") {
  Both worker;
  for (int round = 0; round < 3; ++round) {
    worker.shard(0)[2] = static_cast<float>(round) + 100.0f;
    worker.StartBoth();
    const v1::StepDone transferred = worker.Done();
    REQUIRE(transferred.step() == v1::STEP_TRANSFER);
    REQUIRE_FALSE(transferred.has_error());
    worker.Landed(1);
    worker.Landed(kAllLanded);
    const v1::StepDone verified = worker.Done();
    REQUIRE(verified.step() == v1::STEP_VERIFY);
    REQUIRE_FALSE(verified.has_error());
    CHECK(transferred.digests(0).SerializeAsString() == verified.digests(0).SerializeAsString());
  }
}

TEST_CASE("marks of another attempt or round do not let a verification read") {
  Both worker;
  worker.StartBoth();
  REQUIRE(worker.Done().step() == v1::STEP_TRANSFER);
  ++worker.round;
  worker.Landed(kAllLanded);
  --worker.round;
  ++worker.attempts;
  worker.Landed(kAllLanded);
  --worker.attempts;
  worker.CancelCurrent();
  const v1::StepDone verified = worker.Done();
  CHECK(verified.step() == v1::STEP_VERIFY);
  CHECK(ReasonOf(verified.error()) == reason::kCancelled);
}

TEST_CASE("an engine that dies ends the verification that waits beside the transfer") {
  Both worker;
  worker.Start(v1::STEP_VERIFY);
  worker.engine.reset();
  const v1::StepDone verified = worker.Done();
  CHECK(ReasonOf(verified.error()) == reason::kPeerLost);
  CHECK(verified.error().peer() == "engine e0 tp 0");
  CHECK(worker.reports.TakeLost(kEngine).has_value());
}

TEST_CASE("a transfer says what has landed, window by window") {
  Both worker;
  worker.Start(v1::STEP_TRANSFER);
  std::vector<uint32_t> marks;
  while (true) {
    const auto report = worker.reports.Take(
        [](const v1::WorkerReport& any) { return any.has_landed() || any.has_done(); });
    REQUIRE(report.has_value());
    if (report->has_done()) break;
    CHECK(report->landed().target() == 0);
    CHECK(report->landed().attempt().counter() == worker.attempts);
    marks.push_back(report->landed().writes());
  }
  // Two copies of "w" from two actors, one of "b"; the zero fill is the end of the step.
  CHECK(marks == std::vector<uint32_t>{1, 2});
}

}  // namespace weightd::testing
