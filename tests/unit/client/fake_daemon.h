// A daemon and a worker for tests of the client: they speak the contract, keep what they were told
// and do what the test says.
#pragma once

#include <grpcpp/grpcpp.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "daemon/base/scoped_fd.h"
#include "daemon/wire/data_channel.h"
#include "weightd/v1/actor.grpc.pb.h"
#include "weightd/v1/engine.grpc.pb.h"

namespace weightd::testing {

/// Longest wait of a test for something that must happen.
inline constexpr std::chrono::seconds kPatience{30};

/// A directory that is removed with its files.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

/// Accepts one client after the other on a unix socket.
class FakeWorker {
 public:
  FakeWorker(std::string path, std::string token, std::string device = "host");
  ~FakeWorker();

  v1::WorkerEndpoint Endpoint() const;
  /// Waits until `count` registrations have been answered.
  bool AwaitBound(size_t count);
  /// Waits until `count` clients have ended their connection.
  bool AwaitEnded(size_t count);
  size_t ended();
  /// Asks the present client for a part of a staged shard; the ring is then in ring().
  v1::RingFilled Fill(const v1::RingFill& fill);
  const std::byte* ring() const { return ring_; }
  /// While held, the worker does not close its end when a client does: it has not unmapped yet.
  void HoldUnmapping(bool hold);
  /// Closes the present connection, as a death of the worker does.
  void Drop();
  /// Refuses the next registrations with this error.
  void RefuseWith(v1::ErrorDetail error);

  // Of the last registration.
  std::vector<v1::MemoryBinding> bindings();
  std::vector<ScopedFd> TakeSegments();

 private:
  static constexpr size_t kRingBytes = 1 << 16;

  void Run();
  void Serve(DataChannel* channel);
  bool Answer(DataChannel* channel, ReceivedFrame received);

  const std::string path_;
  const std::string token_;
  const std::string device_;
  ScopedFd listener_;
  ScopedFd ring_fd_;
  std::byte* ring_ = nullptr;

  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopping_ = false;
  bool hold_ = false;
  size_t bound_ = 0;
  size_t ended_ = 0;
  DataChannel* channel_ = nullptr;
  v1::ErrorDetail refusal_;
  std::vector<v1::MemoryBinding> bindings_;
  std::vector<ScopedFd> segments_;
  std::deque<v1::RingFilled> filled_;

  std::thread thread_;
};

/// One end of the streams of one service: what arrived, and the stream that is open.
template <typename Request, typename Event>
class FakeService {
 public:
  using Stream = grpc::ServerReaderWriter<Event, Request>;

  /// Called for each request; sends its answers.
  std::function<void(const Request&)> on_request;

  grpc::Status Serve(Stream* stream) {
    {
      const std::lock_guard lock(mutex_);
      stream_ = stream;
      ++opened_;
      changed_.notify_all();
    }
    Request request;
    while (stream->Read(&request)) {
      on_request(request);
      const std::lock_guard lock(mutex_);
      requests_.push_back(request);
      changed_.notify_all();
    }
    const std::lock_guard lock(mutex_);
    if (stream_ == stream) stream_ = nullptr;
    ++closed_;
    changed_.notify_all();
    return grpc::Status::OK;
  }

  bool Send(const Event& event) {
    const std::lock_guard lock(mutex_);
    return stream_ != nullptr && stream_->Write(event);
  }

  /// Waits for the first request, from `*from` on, that satisfies `wanted`, and moves behind it.
  template <typename Wanted>
  bool Await(size_t* from, Wanted wanted, Request* out) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kPatience, [&] {
      for (; *from < requests_.size(); ++*from) {
        if (!wanted(requests_[*from])) continue;
        *out = requests_[(*from)++];
        return true;
      }
      return false;
    });
  }

  bool AwaitClosed(size_t count) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kPatience, [&] { return closed_ >= count; });
  }

  std::vector<Request> requests() {
    const std::lock_guard lock(mutex_);
    return requests_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  Stream* stream_ = nullptr;
  size_t opened_ = 0;
  size_t closed_ = 0;
  std::vector<Request> requests_;
};

/// Welcomes and registers every client with `worker`.
class FakeDaemon {
 public:
  using Actor = FakeService<v1::ActorRequest, v1::ActorEvent>;
  using Engine = FakeService<v1::EngineRequest, v1::EngineEvent>;

  FakeDaemon(std::string socket_path, FakeWorker* worker);
  ~FakeDaemon();

  void Start();
  /// Ends all streams, as the daemon's death does.
  void Stop();
  std::string address() const { return "unix:" + path_; }

  uint32_t protocol_major = 1;
  bool wants_table = true;
  /// What an engine is told beside its own worker.
  std::vector<v1::WorkerEndpoint> writers;
  /// Answers a sync; by default with success. The handler may send nothing.
  std::function<void(const v1::ActorSync&)> on_sync;
  Actor actor;
  Engine engine;

 private:
  class ActorEndpoint;
  class EngineEndpoint;

  void OnActor(const v1::ActorRequest& request);
  void OnEngine(const v1::EngineRequest& request);

  const std::string path_;
  FakeWorker* const worker_;
  std::unique_ptr<ActorEndpoint> actor_endpoint_;
  std::unique_ptr<EngineEndpoint> engine_endpoint_;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace weightd::testing
