#include "daemon/server/edge/config.h"

#include <arpa/inet.h>
#include <toml++/toml.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "daemon/server/edge/config_keys.h"

namespace weightd {
namespace {

using config::Key;

constexpr char kSample[] = "configs/weightd.toml lists every key";

Status BadConfig(std::string_view where, std::string_view remedy, std::string_view what) {
  return Error(StatusCode::kInvalidArgument, reason::kConfig, remedy, "{}: {}", where, what);
}

std::string At(std::string_view origin, const toml::source_region& source) {
  return fmt::format("{}:{}", origin, source.begin.line);
}

std::string DidYouMean(std::string_view nearest) {
  return nearest.empty() ? std::string(kSample) : fmt::format("did you mean {}?", nearest);
}

std::vector<std::string> Sections(const std::vector<Key>& keys) {
  std::vector<std::string> sections;
  for (const Key& key : keys) {
    if (sections.empty() || sections.back() != key.section) sections.emplace_back(key.section);
  }
  return sections;
}

std::vector<std::string> NamesIn(const std::vector<Key>& keys, std::string_view section) {
  std::vector<std::string> names;
  for (const Key& key : keys) {
    if (section.empty() || key.section == section) names.push_back(key.FullName());
  }
  return names;
}

// nullptr if there is no such key.
const Key* Find(const std::vector<Key>& keys, std::string_view full_name) {
  for (const Key& key : keys) {
    if (key.FullName() == full_name) return &key;
  }
  return nullptr;
}

Status UnknownKey(const std::vector<Key>& keys, std::string_view where, const std::string& name) {
  const std::string nearest = config::Nearest(name, NamesIn(keys, ""));
  return BadConfig(
      where, DidYouMean(nearest),
      fmt::format("unknown key {}{}", name, nearest.empty() ? "" : ", the nearest is " + nearest));
}

config::RawValue ToRaw(const toml::node& node) {
  if (const auto* text = node.as_string()) return text->get();
  if (const auto* flag = node.as_boolean()) return flag->get();
  if (const auto* number = node.as_integer()) return number->get();
  if (const auto* array = node.as_array()) {
    std::vector<std::string> items;
    for (const toml::node& item : *array) {
      if (const auto* text = item.as_string()) items.push_back(text->get());
    }
    if (items.size() == array->size()) return items;
  }
  return std::monostate();
}

Status ApplySection(const std::vector<Key>& keys, std::string_view origin,
                    const std::string& section, const toml::table& table) {
  for (const auto& [name, node] : table) {
    const std::string full_name = section + "." + std::string(name.str());
    const std::string where = At(origin, name.source());
    const Key* key = Find(keys, full_name);
    if (key == nullptr) return UnknownKey(keys, where, full_name);
    if (auto problem = config::Assign(*key, ToRaw(node))) {
      return BadConfig(where, kSample, full_name + " " + *problem);
    }
  }
  return absl::OkStatus();
}

Status ApplyToml(std::string_view text, std::string_view origin, Config* config) {
  toml::table root;
  try {
    root = toml::parse(text, origin);
  } catch (const toml::parse_error& error) {
    return BadConfig(At(origin, error.source()), "correct the TOML syntax there",
                     error.description());
  }
  const std::vector<Key> keys = config::BindKeys(config);
  const std::vector<std::string> sections = Sections(keys);
  for (const auto& [name, node] : root) {
    const std::string section(name.str());
    const std::string where = At(origin, name.source());
    if (std::find(sections.begin(), sections.end(), section) == sections.end()) {
      if (!node.is_table()) return UnknownKey(keys, where, section);
      const std::string nearest = config::Nearest(section, sections);
      return BadConfig(where, DidYouMean(nearest),
                       fmt::format("unknown section [{}]{}", section,
                                   nearest.empty() ? "" : ", the nearest is [" + nearest + "]"));
    }
    const toml::table* table = node.as_table();
    if (table == nullptr) {
      return BadConfig(where, fmt::format("write [{}] and its keys below it", section),
                       fmt::format("{} is a section, not a key", section));
    }
    WEIGHTD_RETURN_IF_ERROR(ApplySection(keys, origin, section, *table));
  }
  return absl::OkStatus();
}

// Kubernetes puts addresses of services into every container; a service named like a section would
// otherwise read as a misspelt key.
bool FromServiceDiscovery(std::string_view name) {
  return name.find("_SERVICE_") != std::string_view::npos || name.ends_with("_PORT") ||
         name.find("_PORT_") != std::string_view::npos;
}

Status ApplyEnvironment(const std::vector<std::string>& environment, Config* config) {
  const std::vector<Key> keys = config::BindKeys(config);
  std::vector<std::string> names;
  names.reserve(keys.size());
  std::vector<std::string> prefixes;
  for (const Key& key : keys) names.push_back(key.Environment());
  for (const std::string& section : Sections(keys)) {
    prefixes.push_back(Key{section.c_str(), "", {}}.Environment());
  }
  for (const std::string& entry : environment) {
    const size_t equals = entry.find('=');
    if (equals == std::string::npos) continue;
    const std::string name = entry.substr(0, equals);
    const auto found = std::find(names.begin(), names.end(), name);
    if (found == names.end()) {
      const bool in_section = std::any_of(prefixes.begin(), prefixes.end(),
                                          [&](const auto& p) { return name.starts_with(p); });
      if (!in_section || FromServiceDiscovery(name)) continue;
      return BadConfig("environment", DidYouMean(config::Nearest(name, names)),
                       fmt::format("{} names no key", name));
    }
    const Key& key = keys[static_cast<size_t>(found - names.begin())];
    if (auto problem = config::AssignText(key, entry.substr(equals + 1))) {
      return BadConfig("environment", kSample, fmt::format("{} {}", name, *problem));
    }
  }
  return absl::OkStatus();
}

Status ApplySets(const std::vector<std::string>& sets, Config* config) {
  const std::vector<Key> keys = config::BindKeys(config);
  for (const std::string& set : sets) {
    const std::string where = "--set " + set;
    const size_t equals = set.find('=');
    if (equals == std::string::npos) {
      return BadConfig(where, "write --set section.key=value", "there is no '='");
    }
    const std::string name = set.substr(0, equals);
    const Key* key = Find(keys, name);
    if (key == nullptr) return UnknownKey(keys, where, name);
    if (auto problem = config::AssignText(*key, set.substr(equals + 1))) {
      return BadConfig(where, kSample, fmt::format("{} {}", name, *problem));
    }
  }
  return absl::OkStatus();
}

StatusOr<std::string> ReadFile(const std::string& path) {
  std::error_code ignored;
  std::ifstream in(path, std::ios::binary);
  if (!in || std::filesystem::is_directory(path, ignored)) {
    return Error(StatusCode::kNotFound, reason::kConfig,
                 "give --config the path of a readable file", "cannot read configuration: {}: {}",
                 path, in ? "is a directory" : std::strerror(errno));
  }
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

}  // namespace

StatusOr<Endpoint> ParseEndpoint(std::string_view text) {
  const auto bad = [&](const char* what) {
    return Error(StatusCode::kInvalidArgument, reason::kConfig,
                 "write HOST:PORT, for example 127.0.0.1:7077 or [::1]:7077",
                 "must be HOST:PORT with an IP address or localhost, but {}", what);
  };
  const size_t colon = text.rfind(':');
  if (colon == std::string_view::npos) return bad("has no port");
  Endpoint endpoint;
  endpoint.host = std::string(text.substr(0, colon));
  const bool brackets =
      endpoint.host.size() >= 2 && endpoint.host.front() == '[' && endpoint.host.back() == ']';
  if (brackets) endpoint.host = endpoint.host.substr(1, endpoint.host.size() - 2);
  unsigned char address[sizeof(in6_addr)];
  const int family = brackets ? AF_INET6 : AF_INET;
  if (endpoint.host != "localhost" && inet_pton(family, endpoint.host.c_str(), address) != 1) {
    return bad("the host is neither");
  }
  const char* end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data() + colon + 1, end, endpoint.port);
  if (parsed.ec != std::errc() || parsed.ptr != end) return bad("the port is not 0 to 65535");
  return endpoint;
}

bool IsLoopback(const Endpoint& endpoint) {
  return endpoint.host == "localhost" || endpoint.host == "::1" ||
         endpoint.host.starts_with("127.");
}

std::string Config::RuntimeDir() const {
  if (!runtime.runtime_dir.empty()) return runtime.runtime_dir;
  return std::filesystem::path(listen.socket).parent_path().string();
}

std::vector<std::string> ConfigKeys() {
  Config config;
  return NamesIn(config::BindKeys(&config), "");
}

StatusOr<Config> ParseConfig(std::string_view text, std::string_view origin) {
  Config config;
  WEIGHTD_RETURN_IF_ERROR(ApplyToml(text, origin, &config));
  return config;
}

StatusOr<Config> LoadConfig(const ConfigSources& sources) {
  Config config;
  if (!sources.file.empty()) {
    WEIGHTD_ASSIGN_OR_RETURN(const std::string text, ReadFile(sources.file));
    WEIGHTD_RETURN_IF_ERROR(ApplyToml(text, sources.file, &config));
  }
  WEIGHTD_RETURN_IF_ERROR(ApplyEnvironment(sources.environment, &config));
  WEIGHTD_RETURN_IF_ERROR(ApplySets(sources.sets, &config));
  return config;
}

std::vector<std::string> ProcessEnvironment() {
  std::vector<std::string> entries;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    if (std::string_view(*entry).starts_with("WEIGHTD_")) entries.emplace_back(*entry);
  }
  return entries;
}

}  // namespace weightd
