// One bidirectional gRPC stream to the daemon, over a socket that we opened ourselves: so we know
// which descriptor a forked child must not keep, and gRPC never reconnects behind our back.
#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "client/src/dial.h"
#include "daemon/base/status.h"

namespace weightd {

/// Makes the channel of a connected socket, which it takes.
std::shared_ptr<grpc::Channel> ChannelOver(Socket* socket);

/// What the end of a stream means to the client. `address` is for the message.
Status StreamEnded(const grpc::Status& status, const std::string& address);

/// A stream of `Service`::Session with the thread that reads it.
/// Thread safety: Send and HalfClose by one thread; Cancel by any.
template <typename Service, typename Request, typename Event>
class ControlStream {
 public:
  struct Callbacks {
    std::function<void(Event)> on_event;  ///< from the reader thread, in order
    std::function<void(Status)> on_end;   ///< last, from the reader thread; never OK
  };

  /// Connects. Blocks up to the deadline. \error UNAVAILABLE DAEMON_LOST
  static StatusOr<std::unique_ptr<ControlStream>> Open(const Address& address,
                                                       Clock::time_point deadline,
                                                       Callbacks callbacks) {
    WEIGHTD_ASSIGN_OR_RETURN(Socket socket, DialDaemon(address, deadline));
    return std::unique_ptr<ControlStream>(
        new ControlStream(std::move(socket), address.text, std::move(callbacks)));
  }

  /// Cancels the stream and waits for the reader.
  ~ControlStream() {
    Cancel();
    reader_.join();
  }
  ControlStream(const ControlStream&) = delete;
  ControlStream& operator=(const ControlStream&) = delete;

  /// Blocks while the daemon does not read. False: the stream has ended; on_end says why.
  bool Send(const Request& request) { return stream_->Write(request); }

  /// Tells the daemon that nothing more will be sent.
  void HalfClose() { stream_->WritesDone(); }

  void Cancel() { context_.TryCancel(); }

 private:
  ControlStream(Socket socket, std::string address, Callbacks callbacks)
      : address_(std::move(address)), callbacks_(std::move(callbacks)) {
    channel_ = ChannelOver(&socket);
    ticket_ = std::move(socket.ticket);
    stub_ = Service::NewStub(channel_);
    stream_ = stub_->Session(&context_);
    reader_ = std::thread([this] { Read(); });
  }

  void Read() {
    Event event;
    while (stream_->Read(&event)) {
      callbacks_.on_event(std::move(event));
      event = Event();
    }
    callbacks_.on_end(StreamEnded(stream_->Finish(), address_));
  }

  const std::string address_;
  const Callbacks callbacks_;
  ForkTicket ticket_;
  std::shared_ptr<grpc::Channel> channel_;  // shared with the stub
  std::unique_ptr<typename Service::Stub> stub_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<Request, Event>> stream_;
  std::thread reader_;
};

}  // namespace weightd
