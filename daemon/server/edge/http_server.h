// The HTTP edge: health for probes and metrics for Prometheus. Reads only; knows no registry, asks
// through callbacks.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "daemon/base/status.h"

namespace weightd {

/// The answer of a readiness probe. `detail` says why not, in one sentence without a newline.
struct Readiness {
  bool ready = false;
  std::string detail;
};

/// What the server asks. Callbacks run on the server's threads, several at a time; they must not
/// block. All must be set.
struct HttpCallbacks {
  std::function<Readiness()> ready;  ///< GET /readyz
  /// GET /readyz/engines/<id>; nullopt if no engine has that name. The name is already decoded.
  std::function<std::optional<Readiness>(const std::string& engine)> engine_ready;
  std::function<std::string()> metrics;  ///< GET /metrics
};

/// Serves
///   /livez                 200 "ok" while the process answers
///   /readyz                200 or 503 with {"ready": ..., "detail": ...}
///   /readyz/engines/<id>   the same for one engine; 404 for an unknown one
///   /metrics               Prometheus' text format
/// Thread safety: Create and destruction from one thread; port() from any.
class HttpServer {
 public:
  /// Binds `address` ("127.0.0.1:7078"; port 0 lets the kernel choose) and starts to serve.
  /// \error INVALID_ARGUMENT CONFIG if the address is malformed
  /// \error UNAVAILABLE SOCKET if it cannot be bound, with the system's reason
  static StatusOr<std::unique_ptr<HttpServer>> Create(const std::string& address,
                                                      HttpCallbacks callbacks);
  /// Stops to accept, waits for running callbacks.
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  uint16_t port() const;

 private:
  struct Impl;
  explicit HttpServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace weightd
