#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "daemon/sync/ports.h"

namespace weightd {

/// Keeps (epoch, highest version per model) in state_dir/versions.json: written to a new file,
/// fsynced, renamed, the directory fsynced. With an empty state_dir it lives in memory only. Thread
/// safety: all functions from any thread.
class VersionFile : public VersionStore {
 public:
  /// Reads the file, if any, and draws a new epoch: above the stored one and not below the time of
  /// day in microseconds. \error INVALID_ARGUMENT CONFIG if state_dir cannot be written or the file
  /// is not what this program wrote
  static StatusOr<std::unique_ptr<VersionFile>> Open(const std::string& state_dir);

  uint64_t epoch() const { return epoch_; }
  uint64_t Highest(const std::string& model) const override;
  Status Save(const std::string& model, uint64_t highest) override;

 private:
  Status Write();

  std::string path_;  // empty: nothing is kept
  uint64_t epoch_ = 0;
  mutable std::mutex mu_;
  std::map<std::string, uint64_t> highest_;
};

}  // namespace weightd
