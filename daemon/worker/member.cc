#include "daemon/worker/member.h"

#include <utility>

#include "daemon/wire/convert.h"

namespace weightd {
namespace {

/// How often a blocked Fill looks whether its step was cancelled.
constexpr milliseconds kCancelCheck{10};

}  // namespace

Member::Member(MemberIdentity identity, DataChannel channel, std::shared_ptr<StagingBudget> budget,
               SegmentMapper* mapper)
    : identity_(std::move(identity)),
      budget_(std::move(budget)),
      mapper_(mapper),
      channel_(std::move(channel)),
      registration_(identity_.writable, identity_.label, mapper) {}

Status Member::Send(const v1::DataFrame& frame, const std::vector<int>& fds) {
  const std::lock_guard lock(send_mutex_);
  // All frames to a client are small and few: a full socket means that it does not read.
  return channel_.Send(frame, Clock::now(), fds);
}

void Member::Refuse(const Status& why) {
  v1::DataFrame frame;
  *frame.mutable_refused()->mutable_error() = ToProto(why);
  Send(frame, {}).IgnoreError();
}

Status Member::Attach(bool wants_ring) {
  v1::DataFrame frame;
  v1::DataAttached& attached = *frame.mutable_attached();
  if (!wants_ring) return Send(frame, {});
  WEIGHTD_ASSIGN_OR_RETURN(const std::shared_ptr<Ring> ring, Ring::Create());
  attached.set_ring_bytes(kRingBytes);
  attached.set_ring_slots(kRingSlots);
  {
    const std::lock_guard lock(mutex_);
    ring_ = ring;
  }
  return Send(frame, {ring->fd()});
}

StatusOr<Member::Outcome> Member::OnFrame(ReceivedFrame received) {
  switch (received.frame.frame_case()) {
    case v1::DataFrame::kSegments:
      if (registration_error_.ok()) {
        registration_error_ =
            registration_.Offer(received.frame.segments(), std::move(received.fds));
      }
      return Outcome();
    case v1::DataFrame::kBind:
      return OnBind(received.frame.bind());
    case v1::DataFrame::kFilled: {
      const std::lock_guard lock(mutex_);
      if (fills_answered_ == fills_asked_) break;
      ++fills_answered_;
      fill_error_ = FromProto(received.frame.filled().error());
      changed_.notify_all();
      return Outcome();
    }
    default:
      break;
  }
  return Error(StatusCode::kInvalidArgument, reason::kProtocol,
               "use the client library of this release",
               "client sent a frame that was not expected: frame={}",
               static_cast<int>(received.frame.frame_case()));
}

StatusOr<Member::Outcome> Member::OnBind(const v1::BindMemory& page) {
  Outcome outcome;
  std::shared_ptr<const MemberMemory> memory;
  if (registration_error_.ok()) {
    StatusOr<std::shared_ptr<const MemberMemory>> bound = registration_.Bind(page);
    if (bound.ok()) {
      memory = *std::move(bound);
    } else {
      registration_error_ = bound.status();
    }
  }
  if (!page.last()) return outcome;
  outcome.registration_ended = true;
  outcome.error = WithRank(std::exchange(registration_error_, absl::OkStatus()), label());
  v1::DataFrame answer;
  if (!outcome.error.ok()) {
    registration_.Abandon();
    *answer.mutable_refused()->mutable_error() = ToProto(outcome.error);
    WEIGHTD_RETURN_IF_ERROR(Send(answer, {}));
    return outcome;
  }
  outcome.mapped_bytes = memory->mapped_bytes;
  answer.mutable_ready()->set_mapped_bytes(memory->mapped_bytes);
  {
    const std::lock_guard lock(mutex_);
    memory_.swap(memory);  // the earlier one is unmapped outside the lock
  }
  WEIGHTD_RETURN_IF_ERROR(Send(answer, {}));
  return outcome;
}

std::shared_ptr<const MemberMemory> Member::memory() const {
  const std::lock_guard lock(mutex_);
  return memory_;
}

StatusOr<const std::byte*> Member::Fill(const v1::RingFill& request,
                                        const std::atomic<bool>* cancelled,
                                        Clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  const std::shared_ptr<Ring> ring = ring_;
  if (ring == nullptr) {
    return WithPeer(Error(StatusCode::kFailedPrecondition, reason::kProtocol,
                          "attach with wants_ring set when shards are staged",
                          "client has staged shards but no ring: member={}", label()),
                    label());
  }
  const uint64_t ticket = ++fills_asked_;
  lock.unlock();
  budget_->Use(ring);
  v1::DataFrame frame;
  *frame.mutable_fill() = request;
  WEIGHTD_RETURN_IF_ERROR(WithPeer(Send(frame, {}), label()));
  lock.lock();
  while (fills_answered_ < ticket) {
    if (lost_) {
      return WithPeer(
          Error(StatusCode::kUnavailable, reason::kPeerLost, "sync again once the rank is back",
                "client ended while it filled a staged shard: member={}", label()),
          label());
    }
    if (cancelled != nullptr && cancelled->load()) {
      return Error(StatusCode::kCancelled, reason::kCancelled, "sync again",
                   "step was cancelled while a staged shard was filled: member={}", label());
    }
    if (Clock::now() >= deadline) {
      return WithPeer(Error(StatusCode::kDeadlineExceeded, reason::kDeadline,
                            "check that the rank is running and not stopped",
                            "client did not fill a staged shard in time: member={}", label()),
                      label());
    }
    changed_.wait_for(lock, kCancelCheck);
  }
  WEIGHTD_RETURN_IF_ERROR(WithPeer(fill_error_, label()));
  return ring->base();
}

void Member::MarkLost() {
  const std::lock_guard lock(mutex_);
  lost_ = true;
  changed_.notify_all();
}

void Member::Release() {
  registration_ = MemoryRegistration(identity_.writable, identity_.label, mapper_);
  std::shared_ptr<const MemberMemory> memory;
  std::shared_ptr<Ring> ring;
  {
    const std::lock_guard lock(mutex_);
    memory.swap(memory_);
    ring.swap(ring_);
  }
  memory.reset();
  ring.reset();
  const std::lock_guard lock(send_mutex_);
  channel_.Close();
}

}  // namespace weightd
