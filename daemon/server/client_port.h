// What the ports to trainer ranks and to engine ranks have in common.
#pragma once

#include <string>
#include <utility>

#include "daemon/server/report_proto.h"
#include "daemon/server/stream.h"
#include "daemon/sync/ports.h"

namespace weightd {

/// `Base` is the port of the sync core, `S` the stream behind it, which may be incomplete until the
/// end of the file, and `Event` the message that it sends. Thread safety: all functions from any
/// thread.
template <typename Base, typename S, typename Event>
class ClientPort : public Base {
 public:
  explicit ClientPort(S* stream) : handle_(stream) {}

  void SendWorkerChanged(const WorkerEndpoint& endpoint) override {
    Event event;
    *event.mutable_worker_changed() = ToProto(endpoint);
    Send(std::move(event));
  }
  void SendStartWorker(const WorkerOrder& order) override {
    Event event;
    *event.mutable_start_worker() = ToProto(order);
    Send(std::move(event));
  }
  void SendStopWorker(const std::string& device, bool again, const std::string& why) override {
    Event event;
    *event.mutable_stop_worker() = StopWorker(device, again, why);
    Send(std::move(event));
  }

  /// Sends unless the stream is gone.
  void Send(Event event) {
    handle_.With([&](S& stream) { stream.Send(std::move(event)); });
  }
  StreamHandle<S>& handle() { return handle_; }

 private:
  StreamHandle<S> handle_;
};

}  // namespace weightd
