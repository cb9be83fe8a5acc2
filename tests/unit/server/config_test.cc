#include "daemon/server/edge/config.h"

#include <unistd.h>

#include <catch2/catch.hpp>
#include <fstream>
#include <sstream>

namespace weightd {
namespace {

using std::chrono::milliseconds;

constexpr char kSamplePath[] = WEIGHTD_SOURCE_DIR "/configs/weightd.toml";

std::string ReadSample() {
  std::ifstream in(kSamplePath);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

// The message of the error that `text` gives; empty if it is accepted.
std::string ErrorOf(std::string_view text) {
  const auto config = ParseConfig(text, "w.toml");
  if (config.ok()) return "";
  CHECK(config.status().code() == StatusCode::kInvalidArgument);
  CHECK(FieldsOf(config.status()).reason == reason::kConfig);
  CHECK_FALSE(FieldsOf(config.status()).remedy.empty());
  return Message(config.status());
}

std::string ErrorOf(const ConfigSources& sources) {
  const auto config = LoadConfig(sources);
  return config.ok() ? "" : Message(config.status());
}

TEST_CASE("an empty file gives the defaults") {
  const auto config = ParseConfig("", "w.toml");
  REQUIRE(config.ok());
  CHECK(*config == Config());
  CHECK(config->listen.socket == "/run/weightd/weightd.sock");
  CHECK(config->deadlines.transfer == milliseconds(15000));
  CHECK(config->limits.window_bytes == 64u << 20);
  CHECK(config->RuntimeDir() == "/run/weightd");
}

TEST_CASE("the sample equals the defaults and shows every key") {
  const std::string sample = ReadSample();
  const auto config = LoadConfig({.file = kSamplePath});
  REQUIRE(config.ok());
  CHECK(*config == Config());
  // A key is shown when taking its line out of the sample is noticed: as an assignment.
  std::string section;
  std::vector<std::string> shown;
  std::istringstream lines(sample);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("[")) section = line.substr(1, line.find(']') - 1);
    if (line.empty() || line[0] == '#' || line[0] == '[') continue;
    shown.push_back(section + "." + line.substr(0, line.find(' ')));
  }
  CHECK(shown == ConfigKeys());
}

TEST_CASE("every key is read into its field") {
  const auto config = ParseConfig(R"(
[listen]
socket = "/tmp/a.sock"
tcp = "[::1]:0"
http = ""
[runtime]
runtime_dir = "/tmp/r"
state_dir = "/tmp/s"
loaders_dir = "/tmp/l"
log_level = "debug"
log_format = "json"
[deadlines]
admit = "1ms"
prepare = "2s"
transfer = "3m"
verify = "4h"
commit = "5 s"
register = "6s"
drain = "7s"
[limits]
max_message_bytes = 8388608
window_bytes = "1MiB"
window_operations = 7
max_sessions = 8
max_tensors = 9
[worker]
devices = ["host.1", "GPU-0a0b0c0d-1111-2222-3333-444444444444"]
threads = 3
peer_check = false
restart_backoff = "250ms"
[catch_up]
enabled = false
retain = "host"
)",
                                  "w.toml");
  REQUIRE(config.ok());
  Config expected;
  expected.listen = {"/tmp/a.sock", "[::1]:0", ""};
  expected.runtime = {"/tmp/r", "/tmp/s", "/tmp/l", "debug", "json"};
  expected.deadlines = {milliseconds(1),          milliseconds(2000), milliseconds(180'000),
                        milliseconds(14'400'000), milliseconds(5000), milliseconds(6000),
                        milliseconds(7000)};
  expected.limits = {8u << 20, 1u << 20, 7, 8, 9};
  expected.worker = {
      {"host.1", "GPU-0a0b0c0d-1111-2222-3333-444444444444"}, 3, false, milliseconds(250)};
  expected.catch_up = {false, "host"};
  CHECK(*config == expected);
  CHECK(config->RuntimeDir() == "/tmp/r");
}

TEST_CASE("devices are a list of names that are known, each once") {
  const auto error = [](const std::string& value) {
    return ErrorOf("[worker]\ndevices = " + value + "\n");
  };
  CHECK(error("[\"host\", \"host.1\"]").empty());
  CHECK(error("\"host\"").find("must be a list of texts") != std::string::npos);
  CHECK(error("[1]").find("must be a list of texts") != std::string::npos);
  CHECK(error("[]").empty());
  const auto none = LoadConfig({.sets = {"worker.devices="}});
  REQUIRE(none.ok());
  CHECK(none->worker.devices.empty());
  CHECK(error("[\"cuda:0\"]").find("w.toml:2: worker.devices has \"cuda:0\"") == 0);
  CHECK(error("[\"host\", \"host\"]").find("names \"host\" twice") != std::string::npos);
  const auto config = LoadConfig({.sets = {"worker.devices=host,host.2"}});
  REQUIRE(config.ok());
  CHECK(config->worker.devices == std::vector<std::string>{"host", "host.2"});
  CHECK_FALSE(ErrorOf(ConfigSources{.sets = {"worker.devices=host,"}}).empty());
}

TEST_CASE("an unknown key is an error with file, line and the nearest key") {
  CHECK(ErrorOf("[listen]\nsokcet = \"/a\"\n") ==
        "w.toml:2: unknown key listen.sokcet, the nearest is listen.socket");
  CHECK(ErrorOf("[listen]\n\nzzzzzzzzzzzzzzzz = 1\n") ==
        "w.toml:3: unknown key listen.zzzzzzzzzzzzzzzz");
  CHECK(ErrorOf("\n[deadline]\nadmit = \"1s\"\n") ==
        "w.toml:2: unknown section [deadline], the nearest is [deadlines]");
  CHECK(ErrorOf("socket = \"/a\"\n").starts_with("w.toml:1: unknown key socket"));
  CHECK(ErrorOf("listen = 3\n") == "w.toml:1: listen is a section, not a key");
  const auto config = ParseConfig("[listen]\nsokcet = \"/a\"\n", "w.toml");
  CHECK(FieldsOf(config.status()).remedy == "did you mean listen.socket?");
}

TEST_CASE("malformed TOML is an error with file and line") {
  CHECK(ErrorOf("[listen]\nsocket = \n").starts_with("w.toml:2: "));
  CHECK(ErrorOf("[listen]\ntcp = \"\"\ntcp = \"\"\n").starts_with("w.toml:3: "));
  CHECK(ErrorOf("\x01\x02").starts_with("w.toml:1: "));
}

TEST_CASE("a value of the wrong type or range is an error with file and line") {
  const std::pair<const char*, const char*> cases[] = {
      {"[listen]\nsocket = 3", "w.toml:2: listen.socket must be a text in quotes"},
      {"[listen]\nsocket = \"a\"", "w.toml:2: listen.socket must be an absolute path"},
      {"[listen]\nsocket = 1979-05-27", "w.toml:2: listen.socket must be a text in quotes"},
      {"[deadlines]\nadmit = 15", "w.toml:2: deadlines.admit must be a duration with its unit"},
      {"[deadlines]\nadmit = \"15\"", "w.toml:2: deadlines.admit must be a duration"},
      {"[deadlines]\nadmit = \"-1s\"", "w.toml:2: deadlines.admit must be a duration"},
      {"[deadlines]\nadmit = \"0s\"", "w.toml:2: deadlines.admit must be between 1ms and 24h"},
      {"[deadlines]\nadmit = \"25h\"", "w.toml:2: deadlines.admit must be between 1ms and 24h"},
      {"[deadlines]\nadmit = \"99999999999999999h\"", "w.toml:2: deadlines.admit must be a dur"},
      {"[limits]\nmax_sessions = -1", "w.toml:2: limits.max_sessions must not be negative"},
      {"[limits]\nmax_sessions = 0", "w.toml:2: limits.max_sessions must be between 1 and"},
      {"[limits]\nmax_sessions = \"8\"", "w.toml:2: limits.max_sessions must be a whole number"},
      {"[limits]\nmax_sessions = 1.5", "w.toml:2: limits.max_sessions must be a whole number"},
      {"[limits]\nwindow_bytes = \"64MB\"", "w.toml:2: limits.window_bytes must be a number of"},
      {"[limits]\nwindow_bytes = \"2GiB\"", "w.toml:2: limits.window_bytes must be between"},
      {"[limits]\nwindow_operations = 1025", "w.toml:2: limits.window_operations must be betw"},
      {"[worker]\npeer_check = \"yes\"", "w.toml:2: worker.peer_check must be true or false"},
      {"[worker]\nthreads = [1]", "w.toml:2: worker.threads must be a whole number"},
      {"[runtime]\nlog_level = \"loud\"", "w.toml:2: runtime.log_level must be one of \"debug\""},
      {"[runtime]\nstate_dir = \"x\"", "w.toml:2: runtime.state_dir must be empty or an absol"},
      {"[catch_up]\nretain = \"disk\"", "w.toml:2: catch_up.retain must be one of \"none\", "},
      {"[listen]\ntcp = \"0.0.0.0:7077\"", "w.toml:2: listen.tcp must be a loopback address"},
      {"[listen]\ntcp = \"127.0.0.1\"", "w.toml:2: listen.tcp must be HOST:PORT"},
      {"[listen]\ntcp = \"127.0.0.1:70000\"", "w.toml:2: listen.tcp must be HOST:PORT"},
      {"[listen]\nhttp = \"[::1]:1\"",
       "w.toml:2: listen.http must be an IPv4 address or localhost"},
      {"[listen]\nhttp = \"example:1\"", "w.toml:2: listen.http must be HOST:PORT"},
  };
  for (const auto& [text, message] : cases) {
    INFO(text);
    CHECK(ErrorOf(text).substr(0, std::string(message).size()) == message);
  }
  CHECK(ErrorOf("[listen]\nhttp = \"0.0.0.0:7078\"").empty());
  const std::string long_path = "/" + std::string(107, 'a');
  CHECK(ErrorOf("[listen]\nsocket = \"" + long_path + "\"") ==
        "w.toml:2: listen.socket is 108 bytes long, a unix socket path holds at most 107");
  CHECK(ErrorOf("[listen]\nsocket = \"" + long_path.substr(1) + "\"") != "");
  CHECK(ErrorOf("[listen]\nsocket = \"" + long_path.substr(0, 107) + "\"").empty());
}

TEST_CASE("the environment wins over the file, --set over both, the last --set over earlier ones") {
  const std::string path = "/tmp/weightd_config_test_" + std::to_string(getpid()) + ".toml";
  std::ofstream(path) << "[worker]\nthreads = 1\n[deadlines]\nadmit = \"1s\"\nprepare = \"1s\"\n";
  ConfigSources sources{.file = path};
  sources.environment = {"WEIGHTD_WORKER_THREADS=2",
                         "WEIGHTD_DEADLINES_ADMIT=2s",
                         "WEIGHTD_WORKER_PEER_CHECK=false",
                         "WEIGHTD_ADDRESS=unix:/x",
                         "PATH=/bin",
                         "WEIGHTD_WORKER_SERVICE_HOST=10.0.0.1"};
  sources.sets = {"worker.threads=3", "worker.threads=4", "limits.window_bytes=1MiB"};
  const auto config = LoadConfig(sources);
  unlink(path.c_str());
  REQUIRE(config.ok());
  CHECK(config->worker.threads == 4);
  CHECK(config->deadlines.admit == milliseconds(2000));
  CHECK(config->deadlines.prepare == milliseconds(1000));
  CHECK_FALSE(config->worker.peer_check);
  CHECK(config->limits.window_bytes == 1u << 20);
}

TEST_CASE("a bad layer is named") {
  CHECK(ErrorOf(ConfigSources{.environment = {"WEIGHTD_WORKER_THREDS=2"}}) ==
        "environment: WEIGHTD_WORKER_THREDS names no key");
  CHECK(ErrorOf(ConfigSources{.environment = {"WEIGHTD_WORKER_THREADS=two"}}) ==
        "environment: WEIGHTD_WORKER_THREADS must be a whole number");
  CHECK(ErrorOf(ConfigSources{.environment = {"WEIGHTD_CATCH_UP_ENABLED=maybe"}}) ==
        "environment: WEIGHTD_CATCH_UP_ENABLED must be true or false");
  CHECK(ErrorOf(ConfigSources{.sets = {"worker.threads"}}) ==
        "--set worker.threads: there is no '='");
  CHECK(ErrorOf(ConfigSources{.sets = {"worker.thread=1"}}) ==
        "--set worker.thread=1: unknown key worker.thread, the nearest is worker.threads");
  CHECK(ErrorOf(ConfigSources{.sets = {"deadlines.admit=5"}})
            .starts_with("--set deadlines.admit=5: deadlines.admit must be a duration"));
  CHECK(ErrorOf(ConfigSources{.file = "/nonexistent/w.toml"}) ==
        "cannot read configuration: /nonexistent/w.toml: No such file or directory");
  CHECK(ErrorOf(ConfigSources{.file = "/tmp"}) ==
        "cannot read configuration: /tmp: is a directory");
}

TEST_CASE("loopback addresses are told from others") {
  for (const char* text : {"127.0.0.1:1", "127.1.2.3:0", "localhost:65535", "[::1]:7"}) {
    const auto endpoint = ParseEndpoint(text);
    INFO(text);
    REQUIRE(endpoint.ok());
    CHECK(IsLoopback(*endpoint));
  }
  for (const char* text : {"10.0.0.1:1", "[::]:1", "0.0.0.0:1"}) {
    const auto endpoint = ParseEndpoint(text);
    INFO(text);
    REQUIRE(endpoint.ok());
    CHECK_FALSE(IsLoopback(*endpoint));
  }
  for (const char* text :
       {"", ":1", "127.0.0.1:", "127.0.0.1:+1", "::1:7", "[127.0.0.1]:1", "a:1"}) {
    INFO(text);
    CHECK_FALSE(ParseEndpoint(text).ok());
  }
}

}  // namespace
}  // namespace weightd
