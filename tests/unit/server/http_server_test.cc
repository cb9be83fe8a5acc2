#include "daemon/server/edge/http_server.h"

#include <arpa/inet.h>
#include <sys/socket.h>

#include <catch2/catch.hpp>

#include "daemon/base/scoped_fd.h"

namespace weightd {
namespace {

// Sends bytes to the loopback port and returns everything until the server closes.
std::string Exchange(uint16_t port, const std::string& request) {
  ScopedFd fd(socket(AF_INET, SOCK_STREAM, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(port);
  if (connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) return "";
  if (send(fd.get(), request.data(), request.size(), MSG_NOSIGNAL) < 0) return "";
  shutdown(fd.get(), SHUT_WR);
  std::string answer;
  char buffer[4096];
  for (ssize_t n = 0; (n = recv(fd.get(), buffer, sizeof(buffer), 0)) > 0;) {
    answer.append(buffer, static_cast<size_t>(n));
  }
  return answer;
}

std::string Ask(uint16_t port, const std::string& method, const std::string& path) {
  return Exchange(port, method + " " + path + " HTTP/1.1\r\nHost: localhost\r\n\r\n");
}

int Code(const std::string& answer) {
  return answer.starts_with("HTTP/1.1 ") ? std::stoi(answer.substr(9, 3)) : 0;
}

std::string Body(const std::string& answer) {
  const size_t end = answer.find("\r\n\r\n");
  return end == std::string::npos ? "" : answer.substr(end + 4);
}

struct Fixture {
  Readiness daemon{true, "1 worker"};
  std::unique_ptr<HttpServer> server;

  Fixture() {
    HttpCallbacks callbacks;
    callbacks.ready = [this] { return daemon; };
    callbacks.engine_ready = [](const std::string& engine) -> std::optional<Readiness> {
      if (engine == "e 0/dp") return Readiness{true, "SERVING version 3"};
      if (engine == "torn") return Readiness{false, "POISONED: \"peer\" lost"};
      return std::nullopt;
    };
    callbacks.metrics = [] { return std::string("weightd_build_info 1\n"); };
    auto created = HttpServer::Create("127.0.0.1:0", callbacks);
    REQUIRE(created.ok());
    server = *std::move(created);
    REQUIRE(server->port() != 0);
  }

  std::string Get(const std::string& path) { return Ask(server->port(), "GET", path); }
};

TEST_CASE("liveness answers ok") {
  Fixture f;
  const std::string answer = f.Get("/livez");
  CHECK(Code(answer) == 200);
  CHECK(Body(answer) == "ok\n");
}

TEST_CASE("readiness follows the callback") {
  Fixture f;
  CHECK(Code(f.Get("/readyz")) == 200);
  CHECK(Body(f.Get("/readyz")) == "{\"ready\":true,\"detail\":\"1 worker\"}\n");
  f.daemon = {false, "draining"};
  CHECK(Code(f.Get("/readyz")) == 503);
  CHECK(Body(f.Get("/readyz")) == "{\"ready\":false,\"detail\":\"draining\"}\n");
}

TEST_CASE("an engine's readiness is asked by its decoded name") {
  Fixture f;
  CHECK(Code(f.Get("/readyz/engines/e%200%2Fdp")) == 200);
  const std::string torn = f.Get("/readyz/engines/torn");
  CHECK(Code(torn) == 503);
  CHECK(Body(torn) == "{\"ready\":false,\"detail\":\"POISONED: \\\"peer\\\" lost\"}\n");
  const std::string unknown = f.Get("/readyz/engines/nobody");
  CHECK(Code(unknown) == 404);
  CHECK(Body(unknown) == "{\"ready\":false,\"detail\":\"no engine is registered as nobody\"}\n");
  CHECK(Code(f.Get("/readyz/engines/%ff%fe")) == 404);
}

TEST_CASE("metrics are served in the text format") {
  Fixture f;
  const std::string answer = f.Get("/metrics");
  CHECK(Code(answer) == 200);
  CHECK(answer.find("Content-Type: text/plain; version=0.0.4") != std::string::npos);
  CHECK(Body(answer) == "weightd_build_info 1\n");
}

TEST_CASE("other paths, methods and bytes are refused and the server stays up") {
  Fixture f;
  CHECK(Code(f.Get("/")) == 404);
  CHECK(Code(f.Get("/etc/passwd")) == 404);
  CHECK(Code(f.Get("/../../etc/passwd")) == 404);
  CHECK(Code(f.Get("/readyz/engines/")) == 404);
  CHECK(Code(Ask(f.server->port(), "POST", "/readyz")) == 405);
  const std::string head = Ask(f.server->port(), "HEAD", "/livez");
  CHECK(Code(head) == 200);
  CHECK(Body(head).empty());
  std::string noise;
  for (int i = 0; i < 5000; ++i) noise += static_cast<char>((i * 2654435761u) >> 13);
  CHECK(Code(Exchange(f.server->port(), noise)) != 200);
  CHECK(Code(f.Get("/livez")) == 200);
}

TEST_CASE("a port in use is an error that names address and cause") {
  Fixture f;
  const std::string address = "127.0.0.1:" + std::to_string(f.server->port());
  const auto second = HttpServer::Create(address, {});
  REQUIRE_FALSE(second.ok());
  CHECK(second.status().code() == StatusCode::kUnavailable);
  CHECK(FieldsOf(second.status()).reason == reason::kSocket);
  CHECK(FieldsOf(second.status()).remedy.find("listen.http") != std::string::npos);
  const std::string message = Message(second.status());
  CAPTURE(message);
  CHECK(message.find(address) != std::string::npos);
  CHECK(message.find("Address already in use") != std::string::npos);
}

TEST_CASE("a malformed address is refused") {
  CHECK(HttpServer::Create("nowhere", {}).status().code() == StatusCode::kInvalidArgument);
  CHECK(HttpServer::Create("[::1]:0", {}).status().code() == StatusCode::kInvalidArgument);
}

TEST_CASE("the port is free after the server is destroyed") {
  uint16_t port = 0;
  {
    Fixture f;
    port = f.server->port();
  }
  CHECK(Ask(port, "GET", "/livez").empty());
  HttpCallbacks none;
  CHECK(HttpServer::Create("127.0.0.1:" + std::to_string(port), none).ok());
}

}  // namespace
}  // namespace weightd
