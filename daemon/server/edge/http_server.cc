#include "daemon/server/edge/http_server.h"

#include <arpa/inet.h>
#include <civetweb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <nlohmann/json.hpp>
#include <thread>

#include "daemon/base/scoped_fd.h"
#include "daemon/server/edge/config.h"

namespace weightd {
namespace {

constexpr char kJson[] = "application/json";
constexpr char kPlain[] = "text/plain; charset=utf-8";
constexpr char kMetricsText[] = "text/plain; version=0.0.4; charset=utf-8";
constexpr std::string_view kEngines = "/readyz/engines/";

// Two threads: a slow reader of /metrics must not delay a probe.
constexpr char kNumThreads[] = "2";
constexpr char kRequestTimeoutMs[] = "2000";

struct Response {
  int code = 200;
  const char* type = kPlain;
  std::string body;
};

const char* Phrase(int code) {
  switch (code) {
    case 200:
      return "OK";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    default:
      return "Service Unavailable";
  }
}

Response FromReadiness(const Readiness& readiness) {
  const nlohmann::ordered_json body = {{"ready", readiness.ready}, {"detail", readiness.detail}};
  // Names come from clients: bytes that are no UTF-8 must not make the answer fail.
  const auto replace = nlohmann::ordered_json::error_handler_t::replace;
  return {readiness.ready ? 200 : 503, kJson, body.dump(-1, ' ', false, replace) + "\n"};
}

Response Route(const HttpCallbacks& callbacks, std::string_view method, std::string_view path) {
  if (method != "GET" && method != "HEAD") return {405, kPlain, "only GET and HEAD\n"};
  if (path == "/livez") return {200, kPlain, "ok\n"};
  if (path == "/readyz") return FromReadiness(callbacks.ready());
  if (path == "/metrics") return {200, kMetricsText, callbacks.metrics()};
  if (path.starts_with(kEngines) && path.size() > kEngines.size()) {
    const std::string engine(path.substr(kEngines.size()));
    if (const auto readiness = callbacks.engine_ready(engine)) return FromReadiness(*readiness);
    Response unknown = FromReadiness({false, "no engine is registered as " + engine});
    unknown.code = 404;
    return unknown;
  }
  return {404, kPlain, "try /livez, /readyz, /readyz/engines/<id> or /metrics\n"};
}

void Send(mg_connection* connection, const Response& response, bool with_body) {
  const std::string head = fmt::format(
      "HTTP/1.1 {} {}\r\nContent-Type: {}\r\nContent-Length: {}\r\n"
      "Cache-Control: no-store\r\nConnection: close\r\n\r\n",
      response.code, Phrase(response.code), response.type, response.body.size());
  mg_write(connection, head.data(), head.size());
  if (with_body) mg_write(connection, response.body.data(), response.body.size());
}

// The address to bind, for civetweb and for Wake. Debian's civetweb is built without IPv6.
StatusOr<sockaddr_in> ToIpv4(const Endpoint& endpoint) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(endpoint.port);
  const char* host = endpoint.host == "localhost" ? "127.0.0.1" : endpoint.host.c_str();
  if (inet_pton(AF_INET, host, &address.sin_addr) == 1) return address;
  return Error(StatusCode::kInvalidArgument, reason::kConfig, "write it as 127.0.0.1:PORT",
               "HTTP is served on IPv4 only: address=[{}]:{}", endpoint.host, endpoint.port);
}

std::string ToText(const sockaddr_in& address) {
  char host[INET_ADDRSTRLEN];
  inet_ntop(AF_INET, &address.sin_addr, host, sizeof(host));
  return fmt::format("{}:{}", host, ntohs(address.sin_port));
}

}  // namespace

struct HttpServer::Impl {
  HttpCallbacks callbacks;
  mg_context* context = nullptr;
  sockaddr_in bound{};
  std::atomic<bool> serving = false;
  std::string start_log;  // what civetweb said while it started; not touched when serving

  ~Impl();
  // Makes the accepting thread return from its poll, which otherwise lasts up to 2 s.
  void Wake() const;
  static int Handle(mg_connection* connection);
  static int Log(const mg_connection* connection, const char* message);
  static void OnStarted(const mg_context* context);
};

int HttpServer::Impl::Handle(mg_connection* connection) {
  const mg_request_info* request = mg_get_request_info(connection);
  const auto* self = static_cast<const Impl*>(request->user_data);
  const Response response =
      Route(self->callbacks, request->request_method,
            request->local_uri == nullptr ? std::string_view() : request->local_uri);
  Send(connection, response, std::strcmp(request->request_method, "HEAD") != 0);
  return response.code;
}

int HttpServer::Impl::Log(const mg_connection* connection, const char* message) {
  auto* self = static_cast<Impl*>(mg_get_user_data(mg_get_context(connection)));
  if (self != nullptr && !self->serving) {
    self->start_log += (self->start_log.empty() ? "" : "; ") + std::string(message);
  }
  return 1;
}

void HttpServer::Impl::OnStarted(const mg_context* context) {
  static_cast<Impl*>(mg_get_user_data(context))->serving = true;
}

void HttpServer::Impl::Wake() const {
  sockaddr_in address = bound;
  if (address.sin_addr.s_addr == htonl(INADDR_ANY)) {
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  }
  ScopedFd fd(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  // A failure only means that the poll lasts its full time.
  (void)connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address));
}

HttpServer::Impl::~Impl() {
  if (context == nullptr) return;
  std::atomic<bool> stopped = false;
  std::jthread stopper([&] {
    mg_stop(context);
    stopped = true;
  });
  while (!stopped) {
    Wake();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpServer::~HttpServer() = default;

StatusOr<std::unique_ptr<HttpServer>> HttpServer::Create(const std::string& address,
                                                         HttpCallbacks callbacks) {
  WEIGHTD_ASSIGN_OR_RETURN(const Endpoint endpoint, ParseEndpoint(address));
  auto impl = std::make_unique<Impl>();
  impl->callbacks = std::move(callbacks);
  WEIGHTD_ASSIGN_OR_RETURN(impl->bound, ToIpv4(endpoint));
  const std::string ports = ToText(impl->bound);
  const char* options[] = {
      "listening_ports",    ports.c_str(),     "num_threads", kNumThreads,
      "request_timeout_ms", kRequestTimeoutMs, nullptr,
  };
  mg_callbacks handlers{};
  handlers.log_message = Impl::Log;
  handlers.begin_request = Impl::Handle;
  handlers.init_context = Impl::OnStarted;
  mg_init_library(MG_FEATURES_DEFAULT);
  mg_context* context = mg_start(&handlers, impl.get(), options);
  if (context == nullptr) {
    return Error(StatusCode::kUnavailable, reason::kSocket,
                 "free the port, choose another listen.http, or turn it off with \"\"",
                 "cannot serve HTTP: address={}, cause={}", address, impl->start_log);
  }
  impl->context = context;
  mg_server_port port{};
  mg_get_server_ports(context, 1, &port);
  impl->bound.sin_port = htons(static_cast<uint16_t>(port.port));
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

uint16_t HttpServer::port() const { return ntohs(impl_->bound.sin_port); }

}  // namespace weightd
