#include "tests/unit/client/fake_daemon.h"

#include <poll.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>

#include "daemon/base/version.h"

namespace weightd::testing {

TempDir::TempDir() {
  char pattern[] = "/tmp/weightd-client-XXXXXX";
  path_ = ::mkdtemp(pattern);
}

TempDir::~TempDir() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

FakeWorker::FakeWorker(std::string path, std::string token, std::string device)
    : path_(std::move(path)), token_(std::move(token)), device_(std::move(device)) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path_.data(), path_.size());
  listener_ = ScopedFd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  WEIGHTD_CHECK(::bind(listener_.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) ==
                0);
  WEIGHTD_CHECK(::listen(listener_.get(), 16) == 0);
  ring_fd_ = ScopedFd(::memfd_create("ring", MFD_CLOEXEC));
  WEIGHTD_CHECK(::ftruncate(ring_fd_.get(), kRingBytes) == 0);
  ring_ = static_cast<std::byte*>(
      ::mmap(nullptr, kRingBytes, PROT_READ, MAP_SHARED, ring_fd_.get(), 0));
  thread_ = std::thread([this] { Run(); });
}

FakeWorker::~FakeWorker() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    if (channel_ != nullptr) channel_->Shutdown();
    changed_.notify_all();
  }
  ::shutdown(listener_.get(), SHUT_RDWR);
  thread_.join();
  ::munmap(ring_, kRingBytes);
}

v1::WorkerEndpoint FakeWorker::Endpoint() const {
  v1::WorkerEndpoint endpoint;
  endpoint.set_socket_path(path_);
  endpoint.set_token(token_);
  endpoint.set_member(7);
  endpoint.set_device(device_);
  return endpoint;
}

void FakeWorker::Run() {
  while (true) {
    ScopedFd client(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (!client.valid()) return;
    DataChannel channel(std::move(client));
    {
      const std::lock_guard lock(mutex_);
      if (stopping_) return;
      channel_ = &channel;
    }
    Serve(&channel);
    std::unique_lock lock(mutex_);
    ++ended_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return !hold_ || stopping_; });
    channel_ = nullptr;
  }
}

void FakeWorker::Serve(DataChannel* channel) {
  while (true) {
    auto received = channel->Receive(Clock::time_point::max());
    if (!received.ok() || !Answer(channel, *std::move(received))) return;
  }
}

bool FakeWorker::Answer(DataChannel* channel, ReceivedFrame received) {
  const Clock::time_point deadline = Clock::now() + kPatience;
  v1::DataFrame answer;
  std::unique_lock lock(mutex_);
  if (received.frame.has_attach()) {
    bindings_.clear();
    segments_.clear();
    if (received.frame.attach().token() != token_) return false;
    const bool ring = received.frame.attach().wants_ring();
    answer.mutable_attached()->set_ring_bytes(ring ? kRingBytes : 0);
    answer.mutable_attached()->set_ring_slots(ring ? 2 : 0);
    const std::vector<int> fds = ring ? std::vector{ring_fd_.get()} : std::vector<int>();
    return channel->Send(answer, deadline, fds).ok();
  }
  for (ScopedFd& fd : received.fds) segments_.push_back(std::move(fd));
  if (received.frame.has_filled()) filled_.push_back(received.frame.filled());
  for (const auto& binding : received.frame.bind().bindings()) bindings_.push_back(binding);
  if (received.frame.bind().last()) {
    if (refusal_.code() != 0) {
      *answer.mutable_refused()->mutable_error() = refusal_;
    } else {
      answer.mutable_ready();
    }
    if (!channel->Send(answer, deadline).ok()) return false;
    ++bound_;
  }
  changed_.notify_all();
  return true;
}

bool FakeWorker::AwaitBound(size_t count) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, kPatience, [&] { return bound_ >= count; });
}

bool FakeWorker::AwaitEnded(size_t count) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, kPatience, [&] { return ended_ >= count; });
}

size_t FakeWorker::ended() {
  const std::lock_guard lock(mutex_);
  return ended_;
}

v1::RingFilled FakeWorker::Fill(const v1::RingFill& fill) {
  v1::DataFrame frame;
  *frame.mutable_fill() = fill;
  std::unique_lock lock(mutex_);
  if (channel_ == nullptr || !channel_->Send(frame, Clock::now() + kPatience).ok()) return {};
  if (!changed_.wait_for(lock, kPatience, [&] { return !filled_.empty(); })) return {};
  v1::RingFilled filled = filled_.front();
  filled_.pop_front();
  return filled;
}

void FakeWorker::HoldUnmapping(bool hold) {
  const std::lock_guard lock(mutex_);
  hold_ = hold;
  changed_.notify_all();
}

void FakeWorker::Drop() {
  const std::lock_guard lock(mutex_);
  if (channel_ != nullptr) channel_->Shutdown();
}

void FakeWorker::RefuseWith(v1::ErrorDetail error) {
  const std::lock_guard lock(mutex_);
  refusal_ = std::move(error);
}

std::vector<v1::MemoryBinding> FakeWorker::bindings() {
  const std::lock_guard lock(mutex_);
  return bindings_;
}

std::vector<ScopedFd> FakeWorker::TakeSegments() {
  const std::lock_guard lock(mutex_);
  return std::move(segments_);
}

class FakeDaemon::ActorEndpoint final : public v1::ActorService::Service {
 public:
  explicit ActorEndpoint(FakeDaemon* daemon) : daemon_(daemon) {}
  grpc::Status Session(
      grpc::ServerContext*,
      grpc::ServerReaderWriter<v1::ActorEvent, v1::ActorRequest>* stream) override {
    return daemon_->actor.Serve(stream);
  }

 private:
  FakeDaemon* const daemon_;
};

class FakeDaemon::EngineEndpoint final : public v1::EngineService::Service {
 public:
  explicit EngineEndpoint(FakeDaemon* daemon) : daemon_(daemon) {}
  grpc::Status Session(
      grpc::ServerContext*,
      grpc::ServerReaderWriter<v1::EngineEvent, v1::EngineRequest>* stream) override {
    return daemon_->engine.Serve(stream);
  }

 private:
  FakeDaemon* const daemon_;
};

FakeDaemon::FakeDaemon(std::string socket_path, FakeWorker* worker)
    : path_(std::move(socket_path)), worker_(worker) {
  actor.on_request = [this](const v1::ActorRequest& request) { OnActor(request); };
  engine.on_request = [this](const v1::EngineRequest& request) { OnEngine(request); };
  on_sync = [this](const v1::ActorSync& sync) {
    v1::ActorEvent event;
    v1::SyncResult* result = event.mutable_result();
    result->set_request(sync.request());
    result->set_version(sync.version());
    if (sync.has_refused()) *result->mutable_error() = sync.refused();
    actor.Send(event);
  };
}

FakeDaemon::~FakeDaemon() { Stop(); }

void FakeDaemon::Start() {
  actor_endpoint_ = std::make_unique<ActorEndpoint>(this);
  engine_endpoint_ = std::make_unique<EngineEndpoint>(this);
  grpc::ServerBuilder builder;
  builder.AddListeningPort("unix:" + path_, grpc::InsecureServerCredentials());
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  builder.RegisterService(actor_endpoint_.get());
  builder.RegisterService(engine_endpoint_.get());
  server_ = builder.BuildAndStart();
  WEIGHTD_CHECK(server_ != nullptr);
}

void FakeDaemon::Stop() {
  if (server_ == nullptr) return;
  server_->Shutdown(std::chrono::system_clock::now());
  server_->Wait();
  server_.reset();
}

void FakeDaemon::OnActor(const v1::ActorRequest& request) {
  v1::ActorEvent event;
  if (request.has_hello()) {
    event.mutable_welcome()->mutable_protocol()->set_major(protocol_major);
    actor.Send(event);
  } else if (request.has_register_() && wants_table) {
    event.mutable_table_wanted();
    actor.Send(event);
  } else if (request.has_register_() || request.table().last()) {
    *event.mutable_registered()->mutable_worker() = worker_->Endpoint();
    actor.Send(event);
  } else if (request.has_sync()) {
    on_sync(request.sync());
  }
}

void FakeDaemon::OnEngine(const v1::EngineRequest& request) {
  v1::EngineEvent event;
  if (request.has_hello()) {
    event.mutable_welcome()->mutable_protocol()->set_major(protocol_major);
    engine.Send(event);
  } else if (request.has_register_()) {
    *event.mutable_registered()->mutable_worker() = worker_->Endpoint();
    for (const auto& writer : writers) *event.mutable_registered()->add_writers() = writer;
    engine.Send(event);
  }
}

}  // namespace weightd::testing
