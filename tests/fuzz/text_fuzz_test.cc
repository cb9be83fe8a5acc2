// Texts that people write, nearly right: configuration, rule files, cases, HTTP requests. Each is
// taken, or refused with its name and a remedy.
#include <arpa/inet.h>
#include <sys/socket.h>

#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "client/ctl/pure/case_export.h"
#include "daemon/base/scoped_fd.h"
#include "daemon/layout/loader.h"
#include "daemon/server/edge/config.h"
#include "daemon/server/edge/http_server.h"
#include "tests/fuzz/mutator.h"

namespace weightd {
namespace {

using fuzz::Mutator;

std::string Read(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  std::stringstream text;
  text << stream.rdbuf();
  REQUIRE_FALSE(text.str().empty());
  return text.str();
}

const std::filesystem::path kRoot = WEIGHTD_SOURCE_DIR;

TEST_CASE("a configuration that is nearly right is taken, or refused by its line") {
  Mutator draw(21);
  const std::string sample = Read(kRoot / "configs" / "weightd.toml");
  int refused = 0;
  for (int round = 0; round < 2000; ++round) {
    const auto config = ParseConfig(draw.Mutate(sample), "w.toml");
    if (config.ok()) continue;
    ++refused;
    INFO(Message(config.status()));
    REQUIRE(Message(config.status()).starts_with("w.toml:"));
    REQUIRE_FALSE(FieldsOf(config.status()).remedy.empty());
  }
  CHECK(refused > 100);
}

TEST_CASE("a rule file that is nearly right is taken, or refused by its line") {
  Mutator draw(22);
  const TensorTable table = {{"model.norm.weight", {8}, DType::kFloat32},
                             {"lm_head.weight", {70, 8}, DType::kFloat32}};
  const std::string config = R"({"hidden_size": 8, "num_attention_heads": 2, "vocab_size": 70})";
  int refused = 0;
  for (const auto& entry : std::filesystem::directory_iterator(kRoot / "loaders")) {
    if (entry.path().extension() != ".rules") continue;
    const std::string good = Read(entry.path());
    for (int round = 0; round < 60; ++round) {
      const auto loader = Loader::Parse(draw.Mutate(good), "x.rules");
      if (loader.ok()) {
        const auto bound = (*loader)->Bind(table, config, (*loader)->architectures()[0],
                                           (*loader)->profiles()[0], {});
        if (bound.ok()) (void)(*bound)->Lower({.tp_rank = 1, .tp_size = 2}, {});
        continue;
      }
      ++refused;
      INFO(Message(loader.status()));
      REQUIRE(Message(loader.status()).starts_with("x.rules:"));
      REQUIRE_FALSE(FieldsOf(loader.status()).remedy.empty());
    }
  }
  CHECK(refused > 100);
}

TEST_CASE("a case that is nearly right is taken or refused") {
  Mutator draw(23);
  const auto registry = LoaderRegistry::Create("");
  REQUIRE(registry.ok());
  const std::string good = R"({"architecture": "LlamaForCausalLM", "engine_profile": "vllm-0.32",
 "config": {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 4, "vocab_size": 70,
 "num_hidden_layers": 0, "tie_word_embeddings": true},
 "source": [["model.embed_tokens.weight", [70, 8]], ["model.norm.weight", [8]]],
 "ranks": [{"tp_size": 2, "tp_rank": 0}]})";
  REQUIRE(ExportCaseText(good, "case", **registry).ok());
  for (int round = 0; round < 2000; ++round) {
    const auto text = ExportCaseText(draw.Mutate(good), "case", **registry);
    if (!text.ok()) REQUIRE_FALSE(Message(text.status()).empty());
  }
}

ScopedFd Connect(uint16_t port) {
  ScopedFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  REQUIRE(::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0);
  return fd;
}

std::string Ask(uint16_t port, const std::string& bytes) {
  const ScopedFd fd = Connect(port);
  [[maybe_unused]] ssize_t count = ::send(fd.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
  ::shutdown(fd.get(), SHUT_WR);
  std::string answer(4096, '\0');
  count = ::recv(fd.get(), answer.data(), answer.size(), MSG_WAITALL);
  answer.resize(count > 0 ? static_cast<size_t>(count) : 0);
  return answer;
}

TEST_CASE("an HTTP request that is nearly right is answered or dropped") {
  HttpCallbacks callbacks;
  callbacks.ready = [] { return Readiness{true, ""}; };
  callbacks.engine_ready = [](const std::string& engine) -> std::optional<Readiness> {
    if (engine != "e0") return std::nullopt;
    return Readiness{false, "STAGING"};
  };
  callbacks.metrics = [] { return std::string("weightd_build_info 1\n"); };
  auto server = HttpServer::Create("127.0.0.1:0", std::move(callbacks));
  REQUIRE(server.ok());
  const uint16_t port = (*server)->port();
  const std::string good = "GET /readyz/engines/e0 HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n";
  REQUIRE(Ask(port, good).starts_with("HTTP/1.1 503"));
  Mutator draw(24);
  for (int round = 0; round < 300; ++round) (void)Ask(port, draw.Mutate(good));
  CHECK(Ask(port, good).starts_with("HTTP/1.1 503"));
}

}  // namespace
}  // namespace weightd
