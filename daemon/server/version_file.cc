#include "daemon/server/version_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "daemon/base/clock.h"
#include "daemon/base/scoped_fd.h"

namespace weightd {
namespace {

Status Broken(const std::string& path, const std::string& what) {
  return Error(StatusCode::kInvalidArgument, reason::kConfig,
               "make runtime.state_dir a directory that the daemon may write, or leave it empty",
               "cannot keep versions: {}: {}", path, what);
}

Status SyncPath(const std::string& path, int flags) {
  const ScopedFd fd(::open(path.c_str(), flags | O_CLOEXEC));
  if (!fd.valid() || ::fsync(fd.get()) != 0) return Broken(path, std::strerror(errno));
  return absl::OkStatus();
}

}  // namespace

StatusOr<std::unique_ptr<VersionFile>> VersionFile::Open(const std::string& state_dir) {
  auto file = std::unique_ptr<VersionFile>(new VersionFile);
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  file->epoch_ = static_cast<uint64_t>(std::chrono::duration_cast<microseconds>(now).count());
  if (state_dir.empty()) return file;
  if (::mkdir(state_dir.c_str(), 0700) != 0 && errno != EEXIST) {
    return Broken(state_dir, std::strerror(errno));
  }
  file->path_ = state_dir + "/versions.json";
  std::ifstream in(file->path_);
  if (in) {
    const nlohmann::json json = nlohmann::json::parse(in, nullptr, /*allow_exceptions=*/false);
    if (!json.is_object() || !json.contains("epoch") || !json["epoch"].is_number_unsigned() ||
        !json.contains("models") || !json["models"].is_object()) {
      return Broken(file->path_, "it is not what weightd wrote; move it away to start anew");
    }
    file->epoch_ = std::max(file->epoch_, json["epoch"].get<uint64_t>() + 1);
    for (const auto& [model, highest] : json["models"].items()) {
      if (highest.is_number_unsigned()) file->highest_[model] = highest.get<uint64_t>();
    }
  }
  const std::lock_guard lock(file->mu_);
  WEIGHTD_RETURN_IF_ERROR(file->Write());
  return file;
}

uint64_t VersionFile::Highest(const std::string& model) const {
  const std::lock_guard lock(mu_);
  const auto it = highest_.find(model);
  return it == highest_.end() ? 0 : it->second;
}

Status VersionFile::Save(const std::string& model, uint64_t highest) {
  const std::lock_guard lock(mu_);
  uint64_t& known = highest_[model];
  if (known >= highest) return absl::OkStatus();
  known = highest;
  return Write();
}

Status VersionFile::Write() {
  if (path_.empty()) return absl::OkStatus();
  const std::string fresh = path_ + ".new";
  {
    std::ofstream out(fresh, std::ios::trunc);
    out << nlohmann::json{{"epoch", epoch_}, {"models", highest_}}.dump() << "\n";
    if (!out.flush()) return Broken(fresh, std::strerror(errno));
  }
  WEIGHTD_RETURN_IF_ERROR(SyncPath(fresh, O_RDONLY));
  if (::rename(fresh.c_str(), path_.c_str()) != 0) return Broken(path_, std::strerror(errno));
  return SyncPath(path_.substr(0, path_.rfind('/')), O_RDONLY | O_DIRECTORY);
}

}  // namespace weightd
