#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>

#include "daemon/layout/loader.h"
#include "daemon/layout/name_distance.h"
#include "loaders/embedded_rules.h"

namespace weightd {
namespace {

namespace fs = std::filesystem;

using LoaderList = std::vector<std::shared_ptr<const Loader>>;

// Rule files are small; more is not one.
constexpr uintmax_t kMaxFileBytes = 1 << 20;

StatusOr<std::shared_ptr<const Loader>> ReadFile(const fs::path& path) {
  std::error_code error;
  const uintmax_t bytes = fs::file_size(path, error);
  if (!error && bytes > kMaxFileBytes) {
    return Error(StatusCode::kInvalidArgument, reason::kRuleFile, "split the file",
                 "rule file too large: {}: {} bytes, at most {}", path.string(), bytes,
                 kMaxFileBytes);
  }
  std::ifstream stream(path, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(stream)),
                         std::istreambuf_iterator<char>());
  if (error || !stream.is_open() || stream.bad()) {
    return Error(StatusCode::kInvalidArgument, reason::kRuleFile,
                 "make the file readable for the daemon or remove it",
                 "cannot read rule file: {}: {}", path.string(),
                 error ? error.message() : "open failed");
  }
  return Loader::Parse(text, path.string());
}

StatusOr<LoaderList> ReadDirectory(const std::string& directory) {
  std::error_code error;
  std::vector<fs::path> paths;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    if (it->path().extension() == ".rules") paths.push_back(it->path());
  }
  if (error) {
    return Error(StatusCode::kNotFound, reason::kRuleFile,
                 "create the directory or correct the setting that names it",
                 "cannot read the directory of rule files: {}: {}", directory, error.message());
  }
  std::sort(paths.begin(), paths.end());
  LoaderList loaders;
  for (const fs::path& path : paths) {
    WEIGHTD_ASSIGN_OR_RETURN(loaders.emplace_back(), ReadFile(path));
  }
  return loaders;
}

// Two files of one place that describe the same model would be a matter of luck.
Status CheckDistinct(const LoaderList& loaders) {
  std::set<std::pair<std::string, std::string>> seen;
  for (const auto& loader : loaders) {
    for (const std::string& architecture : loader->architectures()) {
      for (const std::string& profile : loader->profiles()) {
        if (seen.emplace(architecture, profile).second) continue;
        return Error(StatusCode::kInvalidArgument, reason::kRuleFile,
                     "remove the architecture or profile from one of the files",
                     "{}:1: another rule file describes this architecture for this profile, too: "
                     "{}, {}",
                     loader->origin(), architecture, profile);
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace

StatusOr<std::shared_ptr<const LoaderRegistry>> LoaderRegistry::Create(
    const std::string& directory) {
  auto registry = std::make_shared<LoaderRegistry>();
  if (!directory.empty()) {
    WEIGHTD_ASSIGN_OR_RETURN(registry->loaders_, ReadDirectory(directory));
    WEIGHTD_RETURN_IF_ERROR(CheckDistinct(registry->loaders_));
  }
  LoaderList embedded;
  for (const EmbeddedRules& rules : AllEmbeddedRules()) {
    WEIGHTD_ASSIGN_OR_RETURN(embedded.emplace_back(),
                             Loader::Parse(rules.text, fmt::format("embedded:{}", rules.name)));
  }
  WEIGHTD_RETURN_IF_ERROR(CheckDistinct(embedded));
  registry->loaders_.insert(registry->loaders_.end(), embedded.begin(), embedded.end());
  return registry;
}

StatusOr<std::shared_ptr<const Loader>> LoaderRegistry::Find(std::string_view architecture,
                                                             std::string_view profile) const {
  std::set<std::string> profiles;
  std::set<std::string> architectures;
  for (const auto& loader : loaders_) {
    const std::vector<std::string>& own = loader->architectures();
    architectures.insert(own.begin(), own.end());
    if (std::find(own.begin(), own.end(), architecture) == own.end()) continue;
    if (MatchProfile(profile, loader->profiles())) return loader;
    profiles.insert(loader->profiles().begin(), loader->profiles().end());
  }
  if (!profiles.empty()) {
    return Error(StatusCode::kNotFound, reason::kUnknownProfile,
                 "use an engine version that a loader describes, add a rule file for it, or trace "
                 "the engine's loader",
                 "no loader describes {} for engine profile {}; known profiles: {}", architecture,
                 profile, fmt::join(profiles, ", "));
  }
  const std::vector<std::string> known(architectures.begin(), architectures.end());
  return Error(
      StatusCode::kNotFound, reason::kUnknownArchitecture,
      "add a rule file (loaders/README.md says how), trace the engine's loader, or correct "
      "the name",
      "no loader describes architecture {}; nearest: {}; known: {}", architecture,
      fmt::join(NearestNames(architecture, known, 3), ", "), fmt::join(known, ", "));
}

Status LoaderRegistry::CheckProfile(std::string_view architecture, std::string_view profile,
                                    std::span<const ParamInfo> reported) const {
  WEIGHTD_ASSIGN_OR_RETURN(const auto loader, Find(architecture, profile));
  const ParamInfo* foreign = loader->FindForeign(reported);
  if (foreign == nullptr) return absl::OkStatus();
  std::set<std::string> fitting;
  for (const auto& other : loaders_) {
    const std::vector<std::string>& own = other->architectures();
    if (std::find(own.begin(), own.end(), architecture) == own.end()) continue;
    if (MatchProfile(profile, other->profiles())) continue;
    if (other->FindForeign(reported) != nullptr) continue;
    fitting.insert(other->profiles().begin(), other->profiles().end());
  }
  // Names that fit nowhere are told in full when a trainer's tensors are known.
  if (fitting.empty()) return absl::OkStatus();
  const std::string fit = fmt::format("{}", fmt::join(fitting, ", "));
  return WithTensor(
      Error(StatusCode::kInvalidArgument, reason::kUnknownProfile,
            fmt::format("report engine profile {} instead", fit),
            "the engine's parameter names do not fit the profile that it reports: {} {} does not "
            "know {}; they fit {}",
            architecture, profile, foreign->name, fit),
      foreign->name);
}

}  // namespace weightd
