#include "daemon/transport/wire/wire_transport.h"

#include <algorithm>
#include <set>

#include "daemon/transport/step_binder.h"
#include "daemon/transport/wire/wire_binder.h"
#include "daemon/transport/wire/wire_run.h"

namespace weightd {
namespace {

constexpr microseconds kOpeningNap{2000};
constexpr microseconds kNap{200};
/// A wait begins by spinning: turns follow each other within microseconds.
constexpr microseconds kSpin{500};

/// Calls `look` until it says true. \error what it says, or that the opening must end
template <typename Look>
Status Await(Wire& wire, const WireTransport::Offer& offer, const std::atomic<bool>& cancelled,
             Look&& look) {
  while (true) {
    WEIGHTD_ASSIGN_OR_RETURN(const bool done, look());
    if (done) return absl::OkStatus();
    if (cancelled.load()) {
      return Error(StatusCode::kCancelled, reason::kCancelled, "sync again",
                   "wire was not opened: its opening was cancelled");
    }
    if (Clock::now() >= offer.deadline) {
      return Error(StatusCode::kDeadlineExceeded, reason::kDeadline,
                   "look at the other workers: one of them did not join in time; then sync again",
                   "wire was not opened in time");
    }
    wire.AwaitNews(kOpeningNap);
  }
}

/// A few bytes over every link of this device. They land in the ring, whose content is nobody's.
std::vector<WireMessage> FirstMessages(const WireSchedule& schedule, std::byte* ring) {
  std::vector<WireMessage> group;
  uint64_t offset = 0;
  for (const auto& [source, target] : schedule.links) {
    if (source != schedule.rank && target != schedule.rank) continue;
    const bool send = source == schedule.rank;
    group.push_back({send ? target : source, send, ring + offset, kWireAlign});
    offset = (offset + kWireAlign) % (RingBytes(schedule.slots) / 2);
  }
  return group;
}

/// The devices with which a turn exchanges.
std::string PeersOf(const WireSchedule& schedule, uint32_t turn) {
  std::set<std::string> peers;
  for (const WireSide* side : {&schedule.sends, &schedule.receives}) {
    for (const WireOp& op : side->ops_of(turn)) peers.insert(schedule.devices[op.peer]);
  }
  return fmt::format("{}", fmt::join(peers, ", "));
}

Status TurnTooLong(const WireSchedule& schedule, uint32_t turn, milliseconds limit,
                   const std::string& next) {
  const std::string peers = PeersOf(schedule, turn);
  return WithPeer(
      Error(StatusCode::kDeadlineExceeded, reason::kDeadline,
            "look at the named workers: one is frozen, or its device is; then sync again",
            "no turn of the wire ended within {} s: next={} peers={}",
            static_cast<double>(limit.count()) / 1000.0, next, peers),
      "worker " + peers);
}

}  // namespace

WireTransport::~WireTransport() {
  for (auto& [plan, opened] : wires_) opened.wire->Abort();
}

/// A device that is lost stays lost.
Status WireTransport::Note(Status status) {
  const bool lost =
      status.code() == StatusCode::kUnavailable && FieldsOf(status).reason == reason::kDevice;
  broken_ = broken_ || lost;
  return status;
}

Status WireTransport::Reserve(uint64_t bytes) {
  Status status = stage_->Reserve(bytes);
  staging_bytes_.store(stage_->ring_bytes(), std::memory_order_relaxed);
  return status;
}

void WireTransport::Close(uint64_t plan) {
  const auto it = wires_.find(plan);
  if (it == wires_.end()) return;
  it->second.wire->Abort();
  wires_.erase(it);
  if (wires_.empty()) (void)Reserve(0);
}

Status WireTransport::Open(const Offer& offer, const WireSchedule& schedule,
                           const std::atomic<bool>& cancelled) {
  Close(offer.plan);
  if (schedule.devices.empty()) {
    return Error(StatusCode::kInvalidArgument, reason::kProtocol,
                 "run daemon and worker from the same release",
                 "plan has no pair on a wire with this worker: plan={}", offer.plan);
  }
  Opened opened{.number = offer.wire};
  const auto join = [&]() -> Status {
    WEIGHTD_RETURN_IF_ERROR(Reserve(RingBytes(schedule.slots)));
    WEIGHTD_ASSIGN_OR_RETURN(
        opened.wire,
        maker_->Open(offer.id, schedule.rank, static_cast<uint32_t>(schedule.devices.size())));
    return Join(opened, offer, schedule, cancelled);
  };
  Status joined = join();
  if (joined.ok()) {
    wires_[offer.plan] = std::move(opened);
    return joined;
  }
  if (opened.wire != nullptr) opened.wire->Abort();
  if (wires_.empty()) (void)Reserve(0);
  return Note(joined);
}

Status WireTransport::Join(Opened& opened, const Offer& offer, const WireSchedule& schedule,
                           const std::atomic<bool>& cancelled) {
  Wire& wire = *opened.wire;
  WEIGHTD_RETURN_IF_ERROR(Await(wire, offer, cancelled, [&] { return wire.Opened(); }));
  for (uint32_t lane = 0; lane < kWireLanes; ++lane) {
    WEIGHTD_RETURN_IF_ERROR(Await(wire, offer, cancelled, [&] { return wire.Ready(lane); }));
    WEIGHTD_RETURN_IF_ERROR(wire.Start(lane, FirstMessages(schedule, stage_->ring())));
    ++opened.groups;
    const auto ended = [&]() -> StatusOr<bool> {
      WEIGHTD_ASSIGN_OR_RETURN(const uint64_t groups, wire.Ended());
      return groups == opened.groups;
    };
    WEIGHTD_RETURN_IF_ERROR(Await(wire, offer, cancelled, ended));
  }
  return absl::OkStatus();
}

StatusOr<WireTransport::Digests> WireTransport::Transfer(uint64_t plan_handle, uint64_t wire,
                                                         const BoundPlan& plan,
                                                         const WireSchedule& schedule,
                                                         RunControl& control,
                                                         milliseconds turn_limit) {
  const auto it = wires_.find(plan_handle);
  if (it == wires_.end() || it->second.number != wire) {
    return Error(StatusCode::kFailedPrecondition, reason::kWire, "sync again",
                 "wire is not open: wire={} plan={}", wire, plan_handle);
  }
  StatusOr<Digests> digests = RunTurns(it->second, plan, schedule, control, turn_limit);
  if (digests.ok()) return digests;
  it->second.wire->Abort();
  const Status drained = stage_->Drain();
  Close(plan_handle);
  return Note(drained.ok() ? digests.status() : drained);
}

StatusOr<WireTransport::Digests> WireTransport::RunTurns(Opened& opened, const BoundPlan& plan,
                                                         const WireSchedule& schedule,
                                                         RunControl& control,
                                                         milliseconds turn_limit) {
  const StepBinder binder(plan, control, "transfer");
  WEIGHTD_RETURN_IF_ERROR(stage_->Begin(plan, schedule, control));
  const WireBinder names(plan, schedule, stage_->ring());
  WireRun run(*opened.wire, *stage_, schedule, opened.groups);
  const std::vector<std::map<uint32_t, uint32_t>> landed = WritesReceived(schedule);
  Clock::time_point moved = Clock::now(), ended = moved;
  uint32_t reported = 0;
  uint64_t bytes = 0;
  std::string next = names.NameAt(0);
  while (!run.finished()) {
    WEIGHTD_RETURN_IF_ERROR(binder.Check(next));
    WEIGHTD_ASSIGN_OR_RETURN(const bool any, run.Advance());
    const Clock::time_point now = Clock::now();
    if (any) moved = now;
    while (reported < run.turns_done()) {
      bytes += schedule.receives.bytes[reported++];
      ended = now;
      next = names.NameAt(reported);
      if (control.on_window) control.on_window(reported, bytes, next);
      for (const auto& [target, writes] : landed[reported - 1]) {
        if (control.on_landed) control.on_landed(target, writes);
      }
    }
    if (turn_limit.count() > 0 && now - ended > turn_limit) {
      return binder.Fail(TurnTooLong(schedule, reported, turn_limit, next), next);
    }
    if (!any && now - moved > kSpin) opened.wire->AwaitNews(kNap);
  }
  opened.groups = run.groups();
  WEIGHTD_RETURN_IF_ERROR(binder.Check(""));
  WEIGHTD_ASSIGN_OR_RETURN(const std::vector<uint64_t> words, stage_->Words());
  return names.Split(words);
}

}  // namespace weightd
