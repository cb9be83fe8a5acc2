#include "daemon/base/failpoint.h"

#ifdef WEIGHTD_FAILPOINTS
#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>

namespace weightd {

void Failpoint(std::string_view name) {
  const char* dir = std::getenv("WEIGHTD_FAILPOINT_DIR");
  if (dir == nullptr) return;
  const std::string stem = std::string(dir) + "/" + std::string(name);
  if (!std::filesystem::exists(stem + ".arm")) return;
  std::ofstream(stem + ".hit") << getpid();
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (std::filesystem::exists(stem + ".arm") && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

bool Mutated(std::string_view name) {
  static const std::string mutations = [] {
    const char* text = std::getenv("WEIGHTD_MUTATION");
    return text == nullptr ? std::string() : fmt::format(",{},", text);
  }();
  return !mutations.empty() && mutations.find(fmt::format(",{},", name)) != std::string::npos;
}

}  // namespace weightd
#endif
