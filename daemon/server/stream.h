// A bidirectional gRPC stream as an object: messages in by OnMessage, out by Send from any thread.
#pragma once

#include <grpcpp/grpcpp.h>

#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

namespace weightd {

/// One server-side stream. Deletes itself when gRPC is done with it; others keep a StreamHandle.
/// Thread safety: Send and Close from any thread; OnMessage and OnClosed run one at a time, on
/// gRPC's threads, and OnClosed is the last call.
template <typename In, typename Out>
class Stream : public grpc::ServerBidiReactor<In, Out> {
 public:
  explicit Stream(grpc::CallbackServerContext* context) : context_(context) {}

  /// Queues a message. Dropped if the stream is closing.
  void Send(Out message) {
    const std::lock_guard lock(mu_);
    if (closing_) return;
    queue_.push_back(std::move(message));
    if (queue_.size() == 1) this->StartWrite(&queue_.front());
  }

  /// Ends the stream after the queue has been written. Idempotent.
  void Close(grpc::Status status = grpc::Status::OK) {
    const std::lock_guard lock(mu_);
    if (closing_) return;
    closing_ = true;
    status_ = std::move(status);
    FinishIfIdle();
  }

  /// Ends the stream now: the peer is known to be dead.
  void Abort() {
    Close();
    context_->TryCancel();
  }

 protected:
  /// Call at the end of the most derived constructor.
  void Start() { this->StartRead(&incoming_); }

  virtual void OnMessage(In& message) = 0;
  /// The peer is gone or the stream was closed. No OnMessage follows.
  virtual void OnClosed() = 0;

 private:
  void OnReadDone(bool ok) final {
    if (ok) {
      OnMessage(incoming_);
      incoming_.Clear();
      this->StartRead(&incoming_);
      return;
    }
    Close();
  }

  void OnWriteDone(bool ok) final {
    const std::lock_guard lock(mu_);
    queue_.pop_front();
    if (!ok) {
      closing_ = true;
      queue_.clear();
    }
    if (!queue_.empty()) this->StartWrite(&queue_.front());
    FinishIfIdle();
  }

  void OnCancel() final { Close(); }

  void OnDone() final {
    OnClosed();
    delete this;
  }

  void FinishIfIdle() {
    if (!closing_ || !queue_.empty() || finished_) return;
    finished_ = true;
    this->Finish(status_);
  }

  grpc::CallbackServerContext* const context_;
  In incoming_;
  std::mutex mu_;
  std::deque<Out> queue_;  // front is being written
  grpc::Status status_;
  bool closing_ = false;
  bool finished_ = false;
};

/// A way to a stream that may have gone: ports hold one. The stream detaches in OnClosed.
/// Thread safety: all functions from any thread.
template <typename S>
class StreamHandle {
 public:
  explicit StreamHandle(S* stream) : stream_(stream) {}

  /// Calls fn(stream) if it is still there.
  template <typename Fn>
  void With(Fn&& fn) {
    const std::lock_guard lock(mu_);
    if (stream_ != nullptr) fn(*stream_);
  }

  void Detach() {
    const std::lock_guard lock(mu_);
    stream_ = nullptr;
  }

 private:
  std::mutex mu_;
  S* stream_;
};

}  // namespace weightd
