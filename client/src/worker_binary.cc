#include "client/src/worker_binary.h"

#include <dlfcn.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <utility>

namespace weightd {
namespace {

constexpr char kName[] = "weightd";

bool IsProgram(const std::string& path) {
  struct stat file {};
  return ::stat(path.c_str(), &file) == 0 && S_ISREG(file.st_mode) &&
         ::access(path.c_str(), X_OK) == 0;
}

std::string Absolute(const std::string& path) {
  std::error_code error;
  const auto absolute = std::filesystem::absolute(path, error);
  return error ? path : absolute.lexically_normal().string();
}

std::string Variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

Status Missing(const std::string& looked_at) {
  return Error(StatusCode::kFailedPrecondition, reason::kWorkerStart,
               "install the weightd wheel, which has it, set WEIGHTD_BIN to a built weightd, or "
               "let the daemon serve the device (worker.devices, worker=\"daemon\")",
               "the program of the worker is not there: looked at {}", looked_at);
}

}  // namespace

BinaryPlaces PlacesHere(std::string option) {
  BinaryPlaces places{.option = std::move(option),
                      .variable = Variable("WEIGHTD_BIN"),
                      .search_path = Variable("PATH")};
  Dl_info info{};
  if (::dladdr(reinterpret_cast<const void*>(&PlacesHere), &info) != 0) {
    places.library_dir = std::filesystem::path(Absolute(info.dli_fname)).parent_path().string();
  }
  return places;
}

StatusOr<std::string> FindWorkerBinary(const BinaryPlaces& places) {
  for (const auto& [name, path] : {std::pair("the option worker_binary", places.option),
                                   std::pair("WEIGHTD_BIN", places.variable)}) {
    if (path.empty()) continue;
    if (IsProgram(path)) return Absolute(path);
    return Missing(fmt::format("{} ({}), which is no executable file", name, path));
  }
  std::vector<std::string> beside;
  if (!places.library_dir.empty()) {
    beside = {places.library_dir + "/" + kName, places.library_dir + "/../bin/" + kName};
  }
  for (const std::string& path : beside) {
    if (IsProgram(path)) return Absolute(path);
  }
  for (size_t begin = 0; begin < places.search_path.size();) {
    const size_t end = std::min(places.search_path.find(':', begin), places.search_path.size());
    const std::string folder = places.search_path.substr(begin, end - begin);
    const std::string path = (folder.empty() ? "." : folder) + "/" + kName;
    if (IsProgram(path)) return Absolute(path);
    begin = end + 1;
  }
  return Missing(
      fmt::format("the option worker_binary and WEIGHTD_BIN (neither is set), {}, and "
                  "PATH ({})",
                  fmt::join(beside, ", "), places.search_path));
}

}  // namespace weightd
