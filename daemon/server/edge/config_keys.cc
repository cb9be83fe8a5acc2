#include "daemon/server/edge/config_keys.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <charconv>

#include "daemon/plan/data_path.h"

namespace weightd::config {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kMinDuration{1};
constexpr milliseconds kMaxDuration{24 * 3600 * 1000};
// sockaddr_un holds 108 bytes with the terminating zero.
constexpr size_t kMaxSocketPath = 107;
constexpr uint64_t kKiB = 1024;
constexpr uint64_t kMiB = kKiB << 10;
constexpr uint64_t kGiB = kMiB << 10;

using Check = std::optional<std::string>;

Check CheckSocket(const std::string& value) {
  if (value.empty() || value[0] != '/') return "must be an absolute path";
  if (value.size() > kMaxSocketPath) {
    return fmt::format("is {} bytes long, a unix socket path holds at most {}", value.size(),
                       kMaxSocketPath);
  }
  return std::nullopt;
}

Check CheckDirectory(const std::string& value) {
  if (!value.empty() && value[0] != '/') return "must be empty or an absolute path";
  return std::nullopt;
}

Check CheckEndpoint(const std::string& value) {
  if (value.empty()) return std::nullopt;
  const auto endpoint = ParseEndpoint(value);
  if (!endpoint.ok()) return Message(endpoint.status());
  return std::nullopt;
}

Check CheckHttp(const std::string& value) {
  if (auto problem = CheckEndpoint(value)) return problem;
  // Debian's civetweb is built without IPv6.
  if (value.starts_with('[')) return "must be an IPv4 address or localhost";
  return std::nullopt;
}

Check CheckTcp(const std::string& value) {
  if (auto problem = CheckEndpoint(value)) return problem;
  if (!value.empty() && !IsLoopback(*ParseEndpoint(value))) {
    return "must be a loopback address (127.0.0.1, ::1 or localhost): the control plane is not "
           "encrypted, so other hosts may not reach it";
  }
  return std::nullopt;
}

Check CheckOneOf(const std::string& value, std::initializer_list<const char*> allowed) {
  std::string list;
  for (const char* name : allowed) {
    if (value == name) return std::nullopt;
    list += (list.empty() ? "\"" : ", \"") + std::string(name) + "\"";
  }
  return "must be one of " + list;
}

Check CheckLevel(const std::string& v) { return CheckOneOf(v, {"debug", "info", "warn", "error"}); }
Check CheckFormat(const std::string& v) { return CheckOneOf(v, {"text", "json"}); }
Check CheckPath(const std::string& v) { return CheckOneOf(v, {kAutoPath, kWirePath}); }
Check CheckVerify(const std::string& v) {
  return CheckOneOf(v, {kVerifyAuto, kVerifyBeside, kVerifyAfter});
}
Check CheckRetain(const std::string& v) { return CheckOneOf(v, {"none", "host"}); }

struct Unit {
  const char* name;
  uint64_t factor;
};
constexpr Unit kTimes[] = {{"ms", 1}, {"s", 1000}, {"m", 60'000}, {"h", 3'600'000}};
constexpr Unit kSizes[] = {{"KiB", kKiB}, {"MiB", kMiB}, {"GiB", kGiB}};

// "<digits><unit>" in units of the smallest; nullopt if it is anything else or overflows.
template <size_t N>
std::optional<uint64_t> ParseWithUnit(std::string_view text, const Unit (&units)[N]) {
  uint64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end == text.data()) return std::nullopt;
  std::string_view unit(end, static_cast<size_t>(text.data() + text.size() - end));
  while (!unit.empty() && unit[0] == ' ') unit.remove_prefix(1);
  for (const Unit& known : units) {
    uint64_t product = 0;
    if (unit != known.name) continue;
    if (__builtin_mul_overflow(number, known.factor, &product)) return std::nullopt;
    return product;
  }
  return std::nullopt;
}

Check CheckDevices(const std::vector<std::string>& devices) {
  for (const std::string& device : devices) {
    if (!IsDevice(device) && device != kAllGpus) {
      return fmt::format(
          "has \"{}\": a device is \"host\", \"host.N\", \"gpu\" (all GPUs) or \"GPU-\" and a UUID "
          "(nvidia-smi -L)",
          device);
    }
    if (std::count(devices.begin(), devices.end(), device) > 1) {
      return fmt::format("names \"{}\" twice", device);
    }
  }
  return std::nullopt;
}

Check AssignTo(const ListSlot& slot, const RawValue& raw) {
  const auto* list = std::get_if<std::vector<std::string>>(&raw);
  if (list == nullptr) return "must be a list of texts, like [\"host\"]";
  if (auto problem = slot.check(*list)) return problem;
  *slot.value = *list;
  return std::nullopt;
}

Check AssignTo(const TextSlot& slot, const RawValue& raw) {
  const auto* text = std::get_if<std::string>(&raw);
  if (text == nullptr) return "must be a text in quotes";
  if (auto problem = slot.check(*text)) return problem;
  *slot.value = *text;
  return std::nullopt;
}

Check AssignTo(const FlagSlot& slot, const RawValue& raw) {
  const auto* flag = std::get_if<bool>(&raw);
  if (flag == nullptr) return "must be true or false";
  *slot.value = *flag;
  return std::nullopt;
}

Check AssignTo(const CountSlot& slot, const RawValue& raw) {
  const char* expected =
      slot.bytes ? "must be a number of bytes or a text like \"64MiB\"" : "must be a whole number";
  uint64_t number = 0;
  if (const auto* value = std::get_if<int64_t>(&raw)) {
    if (*value < 0) return "must not be negative";
    number = static_cast<uint64_t>(*value);
  } else if (const auto* text = std::get_if<std::string>(&raw); text != nullptr && slot.bytes) {
    const auto parsed = ParseWithUnit(*text, kSizes);
    if (!parsed) return expected;
    number = *parsed;
  } else {
    return expected;
  }
  if (number < slot.min || number > slot.max) {
    return fmt::format("must be between {} and {}", slot.min, slot.max);
  }
  *slot.value = number;
  return std::nullopt;
}

Check AssignTo(const DurationSlot& slot, const RawValue& raw) {
  constexpr char kExpected[] =
      "must be a duration with its unit, like \"100ms\", \"15s\" or \"2m\"";
  const auto* text = std::get_if<std::string>(&raw);
  if (text == nullptr) return kExpected;
  const auto parsed = ParseWithUnit(*text, kTimes);
  if (!parsed) return kExpected;
  const auto max = static_cast<uint64_t>(slot.max.count());
  if (*parsed < static_cast<uint64_t>(slot.min.count()) || *parsed > max) {
    return fmt::format("must be between {}ms and {}h", slot.min.count(), max / 3'600'000);
  }
  *slot.value = milliseconds(static_cast<int64_t>(*parsed));
  return std::nullopt;
}

size_t EditDistance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, replaced});
    }
  }
  return row[b.size()];
}

}  // namespace

std::string Key::Environment() const {
  std::string result = "WEIGHTD_" + std::string(section) + "_" + name;
  for (char& c : result) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return result;
}

std::vector<Key> BindKeys(Config* c) {
  const auto duration = [](milliseconds* value) {
    return DurationSlot{value, kMinDuration, kMaxDuration};
  };
  return {
      {"listen", "socket", TextSlot{&c->listen.socket, CheckSocket}},
      {"listen", "tcp", TextSlot{&c->listen.tcp, CheckTcp}},
      {"listen", "http", TextSlot{&c->listen.http, CheckHttp}},
      {"runtime", "runtime_dir", TextSlot{&c->runtime.runtime_dir, CheckDirectory}},
      {"runtime", "state_dir", TextSlot{&c->runtime.state_dir, CheckDirectory}},
      {"runtime", "loaders_dir", TextSlot{&c->runtime.loaders_dir, CheckDirectory}},
      {"runtime", "log_level", TextSlot{&c->runtime.log_level, CheckLevel}},
      {"runtime", "log_format", TextSlot{&c->runtime.log_format, CheckFormat}},
      {"deadlines", "admit", duration(&c->deadlines.admit)},
      {"deadlines", "prepare", duration(&c->deadlines.prepare)},
      {"deadlines", "transfer", duration(&c->deadlines.transfer)},
      {"deadlines", "verify", duration(&c->deadlines.verify)},
      {"deadlines", "commit", duration(&c->deadlines.commit)},
      {"deadlines", "register", duration(&c->deadlines.registration)},
      {"deadlines", "drain", duration(&c->deadlines.drain)},
      // Pages of 1 MiB must fit with room for their last entry.
      {"limits", "max_message_bytes",
       CountSlot{&c->limits.max_message_bytes, 2 * kMiB, kGiB, true}},
      {"limits", "window_bytes", CountSlot{&c->limits.window_bytes, 4 * kKiB, kGiB, true}},
      {"limits", "window_operations", CountSlot{&c->limits.window_operations, 1, 1024, false}},
      {"limits", "max_sessions", CountSlot{&c->limits.max_sessions, 1, 1'000'000, false}},
      {"limits", "max_tensors", CountSlot{&c->limits.max_tensors, 1, 100'000'000, false}},
      {"worker", "devices", ListSlot{&c->worker.devices, CheckDevices}},
      {"worker", "threads", CountSlot{&c->worker.threads, 0, 1024, false}},
      {"worker", "peer_check", FlagSlot{&c->worker.peer_check}},
      {"worker", "restart_backoff", duration(&c->worker.restart_backoff)},
      {"worker", "path", TextSlot{&c->worker.path, CheckPath}},
      {"worker", "wire_bytes", CountSlot{&c->worker.wire_bytes, kMinWireBytes, 64 * kGiB, true}},
      {"worker", "verify", TextSlot{&c->worker.verify, CheckVerify}},
      {"catch_up", "enabled", FlagSlot{&c->catch_up.enabled}},
      {"catch_up", "retain", TextSlot{&c->catch_up.retain, CheckRetain}},
  };
}

std::optional<std::string> Assign(const Key& key, const RawValue& value) {
  return std::visit([&](const auto& slot) { return AssignTo(slot, value); }, key.slot);
}

std::optional<std::string> AssignText(const Key& key, const std::string& text) {
  if (std::holds_alternative<FlagSlot>(key.slot)) {
    if (text == "true" || text == "1") return Assign(key, true);
    if (text == "false" || text == "0") return Assign(key, false);
  }
  if (std::holds_alternative<CountSlot>(key.slot)) {
    int64_t number = 0;
    const char* end = text.data() + text.size();
    const auto parsed = std::from_chars(text.data(), end, number);
    if (parsed.ec == std::errc() && parsed.ptr == end) return Assign(key, number);
  }
  if (std::holds_alternative<ListSlot>(key.slot)) {
    std::vector<std::string> items;
    size_t begin = 0;
    for (size_t end = 0; end != std::string::npos && !text.empty(); begin = end + 1) {
      end = text.find(',', begin);
      items.push_back(text.substr(begin, end - begin));
    }
    return Assign(key, items);
  }
  return Assign(key, text);
}

std::string Nearest(std::string_view word, const std::vector<std::string>& candidates) {
  std::string best;
  // Beyond a third of the word a suggestion would only confuse.
  size_t best_distance = std::max<size_t>(2, word.size() / 3) + 1;
  for (const std::string& candidate : candidates) {
    const size_t distance = EditDistance(word, candidate);
    if (distance < best_distance) {
      best = candidate;
      best_distance = distance;
    }
  }
  return best;
}

}  // namespace weightd::config
