#include "client/ctl/pure/loader_commands.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

namespace weightd {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

}  // namespace

StatusOr<std::vector<std::string>> RuleFiles(const std::string& path) {
  std::error_code error;
  if (!fs::is_directory(path, error)) {
    if (fs::is_regular_file(path, error)) return std::vector<std::string>{path};
    return Error(StatusCode::kNotFound, reason::kRuleFile, "check the path",
                 "no such rule file or directory: {}", path);
  }
  std::vector<std::string> files;
  for (fs::directory_iterator it(path, error), end; !error && it != end; it.increment(error)) {
    if (it->path().extension() == ".rules") files.push_back(it->path().string());
  }
  std::sort(files.begin(), files.end());
  if (!files.empty()) return files;
  return Error(StatusCode::kNotFound, reason::kRuleFile, "name a directory with *.rules files",
               "no rule file in directory: {}", path);
}

StatusOr<std::shared_ptr<const Loader>> ParseRuleFile(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream.is_open()) {
    return Error(StatusCode::kNotFound, reason::kRuleFile, "make the file readable",
                 "cannot read rule file: {}", path);
  }
  const std::string text((std::istreambuf_iterator<char>(stream)),
                         std::istreambuf_iterator<char>());
  return Loader::Parse(text, path);
}

std::string ListLoaders(const LoaderRegistry& registry, bool json) {
  Json list = Json::array();
  std::string text =
      fmt::format("{:<24} {:<24} {:<28} {}\n", "LOADER", "PROFILES", "ORIGIN", "ARCHITECTURES");
  for (const auto& loader : registry.loaders()) {
    const bool embedded = loader->origin().starts_with("embedded:");
    list.push_back({{"name", loader->name()},
                    {"source", embedded ? "embedded" : "directory"},
                    {"origin", loader->origin()},
                    {"profiles", loader->profiles()},
                    {"architectures", loader->architectures()}});
    text += fmt::format("{:<24} {:<24} {:<28} {}\n", loader->name(),
                        fmt::format("{}", fmt::join(loader->profiles(), " ")), loader->origin(),
                        fmt::join(loader->architectures(), " "));
  }
  return json ? Json{{"loaders", list}}.dump(2) + "\n" : text;
}

StatusOr<LoaderCheck> CheckLoaders(const std::string& path, bool json) {
  WEIGHTD_ASSIGN_OR_RETURN(const std::vector<std::string> files, RuleFiles(path));
  Json list = Json::array();
  std::string text;
  LoaderCheck check{.passed = true};
  for (const std::string& file : files) {
    const auto loader = ParseRuleFile(file);
    Json entry{{"path", file}, {"ok", loader.ok()}};
    if (loader.ok()) {
      entry["architectures"] = (*loader)->architectures();
      entry["profiles"] = (*loader)->profiles();
      text +=
          fmt::format("ok     {}: {} for {}\n", file, fmt::join((*loader)->architectures(), ", "),
                      fmt::join((*loader)->profiles(), ", "));
    } else {
      check.passed = false;
      const std::string remedy = FieldsOf(loader.status()).remedy;
      entry["error"] = Message(loader.status());
      entry["remedy"] = remedy;
      text += fmt::format("error  {}\n       {}\n", Message(loader.status()), remedy);
    }
    list.push_back(std::move(entry));
  }
  check.output = json ? Json{{"files", list}}.dump(2) + "\n" : text;
  return check;
}

}  // namespace weightd
