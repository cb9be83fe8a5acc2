#include "daemon/registry/version_ledger.h"

#include "daemon/base/failpoint.h"

namespace weightd {

Status VersionLedger::Admit(uint64_t version, bool replicas_behind) const {
  if (version == 0) {
    return Error(StatusCode::kInvalidArgument, reason::kStaleVersion,
                 "number versions from 1 upwards", "version 0 cannot be synced");
  }
  if (Mutated("reuse_version")) return absl::OkStatus();
  if (version < highest_) {
    return Error(StatusCode::kFailedPrecondition, reason::kStaleVersion,
                 fmt::format("sync a version above {}", highest_),
                 "version is older than the latest: version={} latest={}", version, highest_);
  }
  if (version == highest_ && !replicas_behind) {
    return Error(StatusCode::kAlreadyExists, reason::kReusedVersion,
                 fmt::format("sync a version above {}", highest_),
                 "version was used before and every engine holds it: version={}", version);
  }
  return absl::OkStatus();
}

Status VersionLedger::CheckRetry(uint64_t version, const std::string& layout,
                                 uint64_t digest) const {
  if (version != highest_) return absl::OkStatus();
  const auto it = digests_.find(layout);
  if (it == digests_.end() || it->second == digest) return absl::OkStatus();
  return Error(StatusCode::kFailedPrecondition, reason::kReusedVersion,
               fmt::format("sync the changed weights as a version above {}", highest_),
               "version was committed before with other bytes: version={}", version);
}

void VersionLedger::Consume(uint64_t version, const std::string& layout, uint64_t digest) {
  Observe(version);
  if (version == highest_) digests_[layout] = digest;
}

void VersionLedger::Observe(uint64_t version) {
  if (version <= highest_) return;
  highest_ = version;
  digests_.clear();
}

}  // namespace weightd
