#include "daemon/worker/member_table.h"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "daemon/base/failpoint.h"
#include "daemon/base/log.h"
#include "daemon/wire/convert.h"

namespace weightd {
namespace {

// What an epoll event is about: these two, or 2 * key for a socket and 2 * key + 1 for a process.
constexpr uint64_t kListenEvent = 0;
constexpr uint64_t kWakeEvent = 1;

constexpr size_t kMaxPending = 256;       ///< accepted sockets that have not attached
constexpr int kFramesPerTurn = 64;        ///< of one client, before others have theirs
constexpr milliseconds kAcceptRest{100};  ///< without accepting, after descriptors ran out

/// Compares in a time that does not depend on where the tokens differ.
bool SameToken(const std::string& a, const std::string& b) {
  unsigned char difference = a.size() == b.size() ? 0 : 1;
  for (size_t i = 0; i < a.size() && i < b.size(); ++i) {
    difference |= static_cast<unsigned char>(a[i] ^ b[i]);
  }
  return difference == 0;
}

MemberTable::Options WithMapper(MemberTable::Options options) {
  if (options.mapper == nullptr) options.mapper = std::make_shared<HostSegmentMapper>();
  return options;
}

Status NotExpected(uint64_t member) {
  return Error(StatusCode::kUnauthenticated, reason::kFenced,
               "register with the daemon again and attach with the token that it returns",
               "client is not expected by this worker: member={}", member);
}

}  // namespace

StatusOr<std::unique_ptr<MemberTable>> MemberTable::Create(const Options& options,
                                                           ReportFn report) {
  WEIGHTD_ASSIGN_OR_RETURN(DataListener listener, DataListener::Create(options.socket_path));
  std::unique_ptr<MemberTable> table(
      new MemberTable(options, std::move(report), std::move(listener)));
  if (!table->epoll_.valid() || !table->wake_.valid() ||
      !table->Watch(table->listener_.fd(), kListenEvent) ||
      !table->Watch(table->wake_.get(), kWakeEvent)) {
    return Error(StatusCode::kResourceExhausted, reason::kFileDescriptors,
                 "raise the limit of open files (ulimit -n) of the worker",
                 "sockets cannot be watched: {}", std::strerror(errno));
  }
  table->thread_ = std::jthread([raw = table.get()] { raw->Poll(); });
  return table;
}

MemberTable::MemberTable(Options options, ReportFn report, DataListener listener)
    : options_(WithMapper(std::move(options))),
      report_(std::move(report)),
      listener_(std::move(listener)),
      epoll_(::epoll_create1(EPOLL_CLOEXEC)),
      wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      budget_(std::make_shared<StagingBudget>()) {}

MemberTable::~MemberTable() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  Wake();
  if (thread_.joinable()) thread_.join();
  for (auto& [key, connection] : connections_) {
    if (connection.member != nullptr) connection.member->Release();
  }
  for (auto& [id, departure] : departing_) departure.member->Release();
}

void MemberTable::Wake() {
  const uint64_t one = 1;
  // Fails only when the counter is full, and then the poll thread is awake anyway.
  [[maybe_unused]] const ssize_t written = ::write(wake_.get(), &one, sizeof(one));
}

void MemberTable::Expect(const v1::ExpectMember& expect) {
  {
    const std::lock_guard lock(mutex_);
    expected_[expect.member()] = {
        .identity = {.id = expect.member(), .writable = expect.writable(), .label = expect.label()},
        .token = expect.token()};
  }
  Wake();
}

void MemberTable::Forget(uint64_t member) {
  {
    const std::lock_guard lock(mutex_);
    expected_.erase(member);
    forgets_.push_back(member);
  }
  Wake();
}

bool MemberTable::Watch(int fd, uint64_t event) {
  epoll_event entry{.events = EPOLLIN, .data = {.u64 = event}};
  return ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &entry) == 0;
}

void MemberTable::Poll() {
  std::array<epoll_event, 64> events;
  while (true) {
    const int count = ::epoll_wait(epoll_.get(), events.data(), events.size(), NextTimeoutMillis());
    for (int i = 0; i < count; ++i) OnEvent(events[static_cast<size_t>(i)].data.u64);
    HandleForgets();
    CheckDeadlines();
    FinishDepartures();
    RetryPending();
    const std::lock_guard lock(mutex_);
    if (stopping_) return;
  }
}

void MemberTable::OnEvent(uint64_t event) {
  if (event == kListenEvent) return AcceptAll();
  if (event == kWakeEvent) {
    uint64_t count = 0;
    [[maybe_unused]] const ssize_t size = ::read(wake_.get(), &count, sizeof(count));
    return;
  }
  const uint64_t key = event / 2;
  const auto it = connections_.find(key);
  if (it == connections_.end()) return;  // ended by an earlier event of this turn
  if (event % 2 == 1) return Lose(key, "process exited");
  if (it->second.member != nullptr) return ReadMember(key);
  ReadPending(key);
}

void MemberTable::AcceptAll() {
  while (true) {
    StatusOr<DataChannel> channel = listener_.Accept();
    if (!channel.ok()) {
      if (channel.status().code() != StatusCode::kDeadlineExceeded) {
        spdlog::warn("clients are not accepted for a moment: {}", Message(channel.status()));
        ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, listener_.fd(), nullptr);
        accept_again_ = Clock::now() + kAcceptRest;
      }
      return;
    }
    const auto pending = std::count_if(connections_.begin(), connections_.end(),
                                       [](const auto& c) { return c.second.member == nullptr; });
    if (static_cast<size_t>(pending) >= kMaxPending) continue;  // closes it
    const uint64_t key = next_key_++;
    if (!Watch(channel->fd(), 2 * key)) continue;
    Connection& connection = connections_[key];
    connection.channel = *std::move(channel);
    connection.deadline = Clock::now() + options_.attach_deadline;
  }
}

void MemberTable::ReadPending(uint64_t key) {
  Connection& connection = connections_.at(key);
  StatusOr<ReceivedFrame> received = connection.channel.Receive(Clock::now());
  if (!received.ok() && received.status().code() == StatusCode::kDeadlineExceeded) return;
  if (!received.ok()) return Refuse(key, received.status());
  if (connection.has_attach || !received->frame.has_attach()) {
    return Refuse(key, Error(StatusCode::kInvalidArgument, reason::kProtocol,
                             "use the client library of this release",
                             "first frame of a client must be its only DataAttach"));
  }
  if (options_.check_peer) {
    const Status user = CheckPeerUser(connection.channel);
    if (!user.ok()) return Refuse(key, user);
  }
  connection.attach = received->frame.attach();
  connection.has_attach = true;
  TryAttach(key);
}

/// Attaches a client whose daemon has announced it and whose predecessor is gone; otherwise it
/// stays pending: the daemon's word may still be under way.
void MemberTable::TryAttach(uint64_t key) {
  const v1::DataAttach& attach = connections_.at(key).attach;
  Expectation expectation;
  {
    const std::lock_guard lock(mutex_);
    const auto it = expected_.find(attach.member());
    if (it == expected_.end()) return;
    expectation = it->second;
  }
  if (!SameToken(expectation.token, attach.token())) {
    return Refuse(key, NotExpected(attach.member()));
  }
  const uint64_t old_key = KeyOf(attach.member());
  if (old_key != 0) Lose(old_key, "replaced by a new connection of the same client");
  FinishDepartures();
  {
    const std::lock_guard lock(mutex_);
    if (departing_.contains(attach.member())) return;
  }
  const Status attached = AttachMember(key, expectation);
  if (!attached.ok()) Refuse(key, attached);
}

Status MemberTable::AttachMember(uint64_t key, const Expectation& expectation) {
  Connection& connection = connections_.at(key);
  WEIGHTD_ASSIGN_OR_RETURN(const ucred peer, connection.channel.PeerCredentials());
  if (peer.pid > 0) {  // 0: in another pid namespace, where only the socket tells
    ScopedFd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, peer.pid, 0)));
    if (!pidfd.valid() && errno == ESRCH) {
      return Error(StatusCode::kUnavailable, reason::kPeerLost, "start the client again",
                   "client exited before it attached: pid={}", peer.pid);
    }
    if (pidfd.valid() && Watch(pidfd.get(), 2 * key + 1)) connection.pidfd = std::move(pidfd);
  }
  connection.member = std::make_shared<Member>(expectation.identity, std::move(connection.channel),
                                               budget_, options_.mapper.get());
  {
    const std::lock_guard lock(mutex_);
    live_[expectation.identity.id] = connection.member;
  }
  const Status attached = connection.member->Attach(connection.attach.wants_ring());
  if (!attached.ok()) {
    connection.member->Refuse(attached);
    Lose(key, Message(attached));
  }
  return absl::OkStatus();
}

void MemberTable::ReadMember(uint64_t key) {
  const std::shared_ptr<Member> member = connections_.at(key).member;
  for (int i = 0; i < kFramesPerTurn; ++i) {
    StatusOr<ReceivedFrame> received = member->channel().Receive(Clock::now());
    if (!received.ok()) {
      if (received.status().code() == StatusCode::kDeadlineExceeded) return;
      if (received.status().code() != StatusCode::kUnavailable) member->Refuse(received.status());
      return Lose(key, Message(received.status()));
    }
    const StatusOr<Member::Outcome> outcome = member->OnFrame(*std::move(received));
    if (!outcome.ok()) {
      member->Refuse(outcome.status());
      return Lose(key, Message(outcome.status()));
    }
    if (outcome->registration_ended) ReportAttached(*member, *outcome);
  }
}

void MemberTable::ReportAttached(const Member& member, const Member::Outcome& outcome) {
  v1::WorkerReport report;
  v1::MemberAttached& attached = *report.mutable_attached();
  attached.set_member(member.identity().id);
  attached.set_mapped_bytes(outcome.mapped_bytes);
  if (!outcome.error.ok()) *attached.mutable_error() = ToProto(outcome.error);
  report_(std::move(report));
  if (outcome.error.ok()) Failpoint("worker.attached");
}

void MemberTable::Refuse(uint64_t key, const Status& why) {
  Connection& connection = connections_.at(key);
  v1::DataFrame frame;
  *frame.mutable_refused()->mutable_error() = ToProto(why);
  if (why.code() != StatusCode::kUnavailable) {
    spdlog::warn("client refused: {}", Message(why));
    connection.channel.Send(frame, Clock::now()).IgnoreError();
  }
  connections_.erase(key);
}

uint64_t MemberTable::KeyOf(uint64_t member) const {
  for (const auto& [key, connection] : connections_) {
    if (connection.member != nullptr && connection.member->identity().id == member) return key;
  }
  return 0;
}

/// Ends a connection. A member's memory is released once no step uses it; that is then reported.
void MemberTable::Lose(uint64_t key, const std::string& cause) {
  const std::shared_ptr<Member> member = connections_.at(key).member;
  if (member != nullptr) {
    ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, member->channel().fd(), nullptr);
    member->MarkLost();
    const std::lock_guard lock(mutex_);
    const uint64_t id = member->identity().id;
    live_.erase(id);
    departing_[id] = {.member = member, .cause = cause};
    for (PinnedMembers* pinned : pinned_) {
      if (!pinned->entries_.contains(id)) continue;
      if (pinned->lost_label_.empty()) pinned->lost_label_ = member->label();
      pinned->cancel_->store(true);
    }
  }
  connections_.erase(key);
}

void MemberTable::FinishDepartures() {
  while (true) {
    Departure departure;
    {
      const std::lock_guard lock(mutex_);
      const auto it = std::find_if(departing_.begin(), departing_.end(),
                                   [this](const auto& d) { return !pins_.contains(d.first); });
      if (it == departing_.end()) return;
      departure = std::move(it->second);
      departing_.erase(it);
    }
    departure.member->Release();
    v1::WorkerReport report;
    report.mutable_lost()->set_member(departure.member->identity().id);
    report.mutable_lost()->set_cause(departure.cause);
    report_(std::move(report));
  }
}

void MemberTable::HandleForgets() {
  while (true) {
    uint64_t id = 0;
    bool departing = false;
    {
      const std::lock_guard lock(mutex_);
      if (forgets_.empty()) return;
      id = forgets_.front();
      forgets_.pop_front();
      departing = departing_.contains(id);
    }
    const uint64_t key = KeyOf(id);
    if (key != 0) {
      Lose(key, "forgotten by the daemon");
    } else if (!departing) {
      v1::WorkerReport report;
      report.mutable_lost()->set_member(id);
      report.mutable_lost()->set_cause("was not attached");
      report_(std::move(report));
    }
  }
}

/// Looks again at clients that wait for the daemon's word or for their predecessor's end.
void MemberTable::RetryPending() {
  std::vector<uint64_t> keys;
  for (const auto& [key, connection] : connections_) {
    if (connection.member == nullptr && connection.has_attach) keys.push_back(key);
  }
  for (uint64_t key : keys) TryAttach(key);
}

void MemberTable::CheckDeadlines() {
  const Clock::time_point now = Clock::now();
  if (accept_again_ != Clock::time_point{} && now >= accept_again_) {
    accept_again_ = {};
    Watch(listener_.fd(), kListenEvent);
  }
  std::vector<uint64_t> late;
  for (const auto& [key, connection] : connections_) {
    if (connection.member == nullptr && now >= connection.deadline) late.push_back(key);
  }
  for (uint64_t key : late) Refuse(key, NotExpected(connections_.at(key).attach.member()));
}

int MemberTable::NextTimeoutMillis() const {
  Clock::time_point next = Clock::time_point::max();
  if (accept_again_ != Clock::time_point{}) next = accept_again_;
  for (const auto& [key, connection] : connections_) {
    if (connection.member == nullptr) next = std::min(next, connection.deadline);
  }
  if (next == Clock::time_point::max()) return -1;
  const auto left = std::chrono::ceil<milliseconds>(next - Clock::now()).count();
  return static_cast<int>(std::clamp<int64_t>(left, 0, 60'000));
}

}  // namespace weightd
