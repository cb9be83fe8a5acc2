#include "client/src/data_link.h"

#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>

#include "daemon/wire/convert.h"

namespace weightd {
namespace {

constexpr milliseconds kRetryDelay{20};

Status Unexpected(std::string_view wanted) {
  return Error(StatusCode::kInternal, reason::kProtocol,
               "use the daemon and the client library of one release",
               "worker sent an unexpected frame: wanted={}", wanted);
}

/// The refusal in a frame, or OK.
Status Refusal(const v1::DataFrame& frame) {
  return frame.has_refused() ? FromProto(frame.refused().error()) : absl::OkStatus();
}

Status Finished() {
  return Error(StatusCode::kCancelled, reason::kCancelled, "register again",
               "lending was stopped before the worker had taken the memory");
}

}  // namespace

DataLink::DataLink(v1::WorkerEndpoint endpoint, std::shared_ptr<const MemoryOffer> offer,
                   Callbacks callbacks)
    : endpoint_(std::move(endpoint)),
      offer_(std::move(offer)),
      callbacks_(std::move(callbacks)),
      thread_([this] { Run(); }) {}

DataLink::~DataLink() {
  {
    const std::lock_guard lock(mutex_);
    finishing_ = true;
    if (shared_fd_ >= 0) ::shutdown(shared_fd_, SHUT_RDWR);
  }
  thread_.join();
  channel_.Close();
  if (ring_ != nullptr) ::munmap(ring_, ring_bytes_);
}

void DataLink::Finish() {
  const std::lock_guard lock(mutex_);
  finishing_ = true;
  if (shared_fd_ >= 0) ::shutdown(shared_fd_, SHUT_WR);
}

void DataLink::Run() {
  Status attached = Attach();
  const bool ok = attached.ok();
  callbacks_.on_ready(WithPeer(std::move(attached), "worker " + endpoint_.device()));
  if (ok) Serve().IgnoreError();  // its end is what matters, not why
  AwaitEnd();
  callbacks_.on_end();
}

Status DataLink::Attach() {
  const Clock::time_point deadline = Clock::now() + kAttachTimeout;
  WEIGHTD_RETURN_IF_ERROR(Greet(deadline));
  return Offer(deadline);
}

StatusOr<DataChannel> DataLink::Connect(Clock::time_point deadline) {
  while (true) {
    auto socket = DialWorker(endpoint_.socket_path(), deadline);
    {
      const std::lock_guard lock(mutex_);
      if (finishing_) return Finished();
      if (socket.ok()) {
        ticket_ = std::move(socket->ticket);
        shared_fd_ = socket->fd.get();
        return DataChannel(std::move(socket->fd));
      }
    }
    if (Clock::now() + kRetryDelay >= deadline) return socket.status();
    ::poll(nullptr, 0, static_cast<int>(kRetryDelay.count()));
  }
}

/// Connects and says who this is. A worker that closes before it has answered is being replaced.
Status DataLink::Greet(Clock::time_point deadline) {
  v1::DataFrame frame;
  frame.mutable_attach()->set_member(endpoint_.member());
  frame.mutable_attach()->set_token(endpoint_.token());
  frame.mutable_attach()->set_wants_ring(offer_->wants_ring);
  while (true) {
    WEIGHTD_ASSIGN_OR_RETURN(channel_, Connect(deadline));
    Status result = channel_.Send(frame, deadline);
    if (result.ok()) {
      auto answer = channel_.Receive(deadline);
      if (answer.ok()) return TakeRing(*std::move(answer));
      result = answer.status();
    }
    const bool gone = result.code() == StatusCode::kUnavailable;
    if (!gone || Clock::now() + kRetryDelay >= deadline) return result;
    {
      const std::lock_guard lock(mutex_);
      shared_fd_ = -1;
    }
    channel_.Close();
    ::poll(nullptr, 0, static_cast<int>(kRetryDelay.count()));
  }
}

Status DataLink::TakeRing(ReceivedFrame answer) {
  WEIGHTD_RETURN_IF_ERROR(Refusal(answer.frame));
  if (!answer.frame.has_attached()) return Unexpected("attached");
  const v1::DataAttached& attached = answer.frame.attached();
  if (!offer_->wants_ring) return absl::OkStatus();
  struct stat file;
  const bool usable = answer.fds.size() == 1 && attached.ring_slots() > 0 &&
                      ::fstat(answer.fds[0].get(), &file) == 0 &&
                      static_cast<uint64_t>(file.st_size) >= attached.ring_bytes();
  if (!usable) return Unexpected("a ring");
  void* ring = ::mmap(nullptr, attached.ring_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED,
                      answer.fds[0].get(), 0);
  if (ring == MAP_FAILED) {
    return Error(StatusCode::kResourceExhausted, reason::kSharedMemory,
                 "give the process more address space or the worker a smaller ring",
                 "staging ring cannot be mapped: bytes={} cause={}", attached.ring_bytes(),
                 std::strerror(errno));
  }
  ring_ = static_cast<std::byte*>(ring);
  ring_bytes_ = attached.ring_bytes();
  slot_bytes_ = ring_bytes_ / attached.ring_slots();
  return absl::OkStatus();
}

Status DataLink::Offer(Clock::time_point deadline) {
  v1::DataFrame frame;
  for (const SegmentFrame& part : offer_->segments) {
    *frame.mutable_segments() = part.offer;
    WEIGHTD_RETURN_IF_ERROR(channel_.Send(frame, deadline, part.fds));
  }
  for (const v1::BindMemory& page : offer_->bindings) {
    *frame.mutable_bind() = page;
    WEIGHTD_RETURN_IF_ERROR(channel_.Send(frame, deadline));
  }
  WEIGHTD_ASSIGN_OR_RETURN(ReceivedFrame answer, channel_.Receive(deadline));
  WEIGHTD_RETURN_IF_ERROR(Refusal(answer.frame));
  return answer.frame.has_ready() ? absl::OkStatus() : Unexpected("ready");
}

Status DataLink::ServeFill(const v1::RingFill& fill) {
  if (offer_->fill == nullptr || slot_bytes_ == 0 || fill.slot() >= ring_bytes_ / slot_bytes_) {
    return Unexpected("a slot of the ring");
  }
  return offer_->fill(fill, {ring_ + fill.slot() * slot_bytes_, slot_bytes_});
}

/// Answers the worker until it closes.
Status DataLink::Serve() {
  while (true) {
    WEIGHTD_ASSIGN_OR_RETURN(const ReceivedFrame received,
                             channel_.Receive(Clock::time_point::max()));
    if (!received.frame.has_fill()) return Unexpected("fill");
    const v1::RingFill& fill = received.frame.fill();
    v1::DataFrame answer;
    *answer.mutable_filled()->mutable_attempt() = fill.attempt();
    answer.mutable_filled()->set_slot(fill.slot());
    const Status filled = ServeFill(fill);
    if (!filled.ok()) *answer.mutable_filled()->mutable_error() = ToProto(filled);
    WEIGHTD_RETURN_IF_ERROR(channel_.Send(answer, Clock::now() + kAttachTimeout));
  }
}

/// Reads until the worker has closed its end.
void DataLink::AwaitEnd() {
  if (channel_.valid()) {
    ::shutdown(channel_.fd(), SHUT_WR);
    std::byte drop[4096];
    while (true) {
      const ssize_t count = ::recv(channel_.fd(), drop, sizeof(drop), 0);
      if (count > 0 || (count < 0 && errno == EINTR)) continue;
      if (count == 0 || errno != EAGAIN) break;
      pollfd entry{channel_.fd(), POLLIN, 0};
      ::poll(&entry, 1, -1);
    }
  }
  const std::lock_guard lock(mutex_);
  shared_fd_ = -1;
}

}  // namespace weightd
