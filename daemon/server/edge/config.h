// The daemon's configuration: one TOML file, overridden by environment variables, overridden by
// --set. Every key is declared once, in config.cc; configs/weightd.toml shows all of them.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/status.h"

namespace weightd {

/// A TCP address: a host (an IP literal or "localhost") and a port; port 0 lets the kernel choose.
struct Endpoint {
  std::string host;  ///< without brackets
  uint16_t port = 0;
  bool operator==(const Endpoint&) const = default;
};

/// Parses "127.0.0.1:7077", "localhost:0" or "[::1]:7077".
/// \error INVALID_ARGUMENT CONFIG
StatusOr<Endpoint> ParseEndpoint(std::string_view text);

/// True for 127.0.0.0/8, ::1 and "localhost".
bool IsLoopback(const Endpoint& endpoint);

struct ListenConfig {
  std::string socket = "/run/weightd/weightd.sock";  ///< absolute path of the gRPC unix socket
  std::string tcp = "127.0.0.1:7077";                ///< gRPC on loopback; empty = off
  std::string http = "127.0.0.1:7078";               ///< health and metrics; empty = off
  bool operator==(const ListenConfig&) const = default;
};

struct RuntimeConfig {
  std::string runtime_dir;  ///< sockets of the workers; empty = the directory of listen.socket
  std::string state_dir;    ///< keeps (epoch, highest version per model); empty = nothing is kept
  std::string loaders_dir;  ///< rule files beside the embedded ones; empty = none
  std::string log_level = "info";
  std::string log_format = "text";
  bool operator==(const RuntimeConfig&) const = default;
};

/// How long a phase may take; `transfer` is the longest time without progress.
struct DeadlinesConfig {
  std::chrono::milliseconds admit{15000};
  std::chrono::milliseconds prepare{15000};
  std::chrono::milliseconds transfer{15000};
  std::chrono::milliseconds verify{15000};
  std::chrono::milliseconds commit{15000};
  std::chrono::milliseconds registration{10000};  ///< key "register": until a worker knows a client
  std::chrono::milliseconds drain{30000};  ///< from SIGTERM to the cancelling of running syncs
  bool operator==(const DeadlinesConfig&) const = default;
};

struct LimitsConfig {
  uint64_t max_message_bytes = 4 << 20;
  uint64_t window_bytes = 64 << 20;
  uint64_t window_operations = 1024;
  uint64_t max_sessions = 4096;
  uint64_t max_tensors = 1'000'000;
  bool operator==(const LimitsConfig&) const = default;
};

/// In worker.devices: every GPU of the machine.
inline constexpr char kAllGpus[] = "gpu";
/// In worker.path.
inline constexpr char kAutoPath[] = "auto";
inline constexpr char kWirePath[] = "wire";
/// In worker.verify.
inline constexpr char kVerifyAuto[] = "auto";
inline constexpr char kVerifyBeside[] = "beside";
inline constexpr char kVerifyAfter[] = "after";

struct WorkerConfig {
  std::vector<std::string> devices = {"host"};  ///< served, one worker each
  uint64_t threads = 0;                         ///< copying threads per worker; 0 = one per core
  bool peer_check = true;  ///< compare SO_PEERCRED of a member with its registration
  std::chrono::milliseconds restart_backoff{100};  ///< pause before a dead worker is replaced
  std::string path = kAutoPath;      ///< "wire": never store directly between different devices
  uint64_t wire_bytes = 192u << 20;  ///< staging of one device for what is sent
  std::string verify = kVerifyAuto;  ///< beside the transfer or after it; "auto": beside on GPUs
  bool operator==(const WorkerConfig&) const = default;
};

struct CatchUpConfig {
  bool enabled = true;          ///< a late engine is filled from a serving peer or a retained copy
  std::string retain = "none";  ///< "host" keeps a copy of the last version in host memory
  bool operator==(const CatchUpConfig&) const = default;
};

struct Config {
  ListenConfig listen;
  RuntimeConfig runtime;
  DeadlinesConfig deadlines;
  LimitsConfig limits;
  WorkerConfig worker;
  CatchUpConfig catch_up;
  bool operator==(const Config&) const = default;

  /// runtime.runtime_dir, or the directory of listen.socket.
  std::string RuntimeDir() const;
};

/// Where each layer above the defaults comes from.
struct ConfigSources {
  std::string file;               ///< path of the TOML file; empty = none
  std::vector<std::string> sets;  ///< "section.key=value", as given to --set; the last one wins
  /// "NAME=value" entries, as in environ. Only WEIGHTD_<SECTION>_<KEY> is looked at.
  std::vector<std::string> environment;
};

/// The names of all keys, "section.key", in the order of configs/weightd.toml.
std::vector<std::string> ConfigKeys();

/// Parses TOML text on top of the defaults. `origin` names it in errors.
/// \error INVALID_ARGUMENT CONFIG "origin:line: ..." for malformed TOML, an unknown section or key
///        (with the nearest known one), a value of the wrong type or out of its range
StatusOr<Config> ParseConfig(std::string_view text, std::string_view origin);

/// default < file < environment < sets.
/// \error NOT_FOUND CONFIG if the file cannot be read
/// \error INVALID_ARGUMENT CONFIG naming file:line, the environment variable or the --set
StatusOr<Config> LoadConfig(const ConfigSources& sources);

/// The process's environment in the form that ConfigSources wants.
std::vector<std::string> ProcessEnvironment();

}  // namespace weightd
