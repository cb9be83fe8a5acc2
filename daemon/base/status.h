// Errors of weightd: absl::Status with the fields that a user needs to act (tensor, rank, phase,
// peer, remedy). No other file touches absl::string_view: Debian builds Abseil with its own, which
// std::string_view does not convert to.
#pragma once

#include <fmt/format.h>

#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace weightd {

using absl::Status;
using absl::StatusCode;
using absl::StatusOr;

/// What a failure says beside its message. Empty fields are unknown or do not apply.
struct ErrorFields {
  std::string reason;  ///< stable upper-case token, see `reason` below
  std::string tensor;
  std::string rank;
  std::string phase;
  std::string peer;
  std::string remedy;
};

/// The reasons that clients, metrics and tests may rely on.
namespace reason {
inline constexpr char kProtocolVersion[] = "PROTOCOL_VERSION";
inline constexpr char kMissingTensor[] = "MISSING_TENSOR";
inline constexpr char kUnknownTensor[] = "UNKNOWN_TENSOR";
inline constexpr char kDuplicateTensor[] = "DUPLICATE_TENSOR";
inline constexpr char kShape[] = "SHAPE";
inline constexpr char kDtype[] = "DTYPE";
inline constexpr char kGap[] = "GAP";
inline constexpr char kOverlap[] = "OVERLAP";
inline constexpr char kPartial[] = "PARTIAL";
inline constexpr char kMemoryMoved[] = "MEMORY_MOVED";
inline constexpr char kPlanMismatch[] = "PLAN_MISMATCH";
inline constexpr char kTableMismatch[] = "TABLE_MISMATCH";
inline constexpr char kReplicasDiffer[] = "REPLICAS_DIFFER";
inline constexpr char kWorldSize[] = "WORLD_SIZE";
inline constexpr char kDuplicateRank[] = "DUPLICATE_RANK";
inline constexpr char kStaleVersion[] = "STALE_VERSION";
inline constexpr char kReusedVersion[] = "REUSED_VERSION";
inline constexpr char kUnknownArchitecture[] = "UNKNOWN_ARCHITECTURE";
inline constexpr char kUnknownProfile[] = "UNKNOWN_PROFILE";
inline constexpr char kUncoveredParameter[] = "UNCOVERED_PARAMETER";
inline constexpr char kAmbiguousRule[] = "AMBIGUOUS_RULE";
inline constexpr char kRuleFile[] = "RULE_FILE";
inline constexpr char kDivisibility[] = "DIVISIBILITY";
inline constexpr char kConfig[] = "CONFIG";
inline constexpr char kCheckpoint[] = "CHECKPOINT";
inline constexpr char kFenced[] = "FENCED";
inline constexpr char kForked[] = "FORKED";
inline constexpr char kPeerLost[] = "PEER_LOST";
inline constexpr char kWorkerLost[] = "WORKER_LOST";
inline constexpr char kWorkerStart[] = "WORKER_START";
inline constexpr char kDaemonLost[] = "DAEMON_LOST";
inline constexpr char kDeadline[] = "DEADLINE";
inline constexpr char kCancelled[] = "CANCELLED";
inline constexpr char kVerifyMismatch[] = "VERIFY_MISMATCH";
inline constexpr char kEngineRefused[] = "ENGINE_REFUSED";
inline constexpr char kNoEngine[] = "NO_ENGINE";
inline constexpr char kNoPlan[] = "NO_PLAN";
inline constexpr char kNoPath[] = "NO_PATH";
inline constexpr char kUnknownDevice[] = "UNKNOWN_DEVICE";
inline constexpr char kMessageTooLarge[] = "MESSAGE_TOO_LARGE";
inline constexpr char kTooManySessions[] = "TOO_MANY_SESSIONS";
inline constexpr char kSharedMemory[] = "SHARED_MEMORY";
inline constexpr char kFileDescriptors[] = "FILE_DESCRIPTORS";
inline constexpr char kDevice[] = "DEVICE";
inline constexpr char kGpuMemory[] = "GPU_MEMORY";
inline constexpr char kNcclVersion[] = "NCCL_VERSION";
inline constexpr char kWire[] = "WIRE";
inline constexpr char kSocket[] = "SOCKET";
inline constexpr char kMemory[] = "MEMORY";
inline constexpr char kProtocol[] = "PROTOCOL";
inline constexpr char kStaged[] = "STAGED";
inline constexpr char kDraining[] = "DRAINING";
inline constexpr char kInternal[] = "INTERNAL";
}  // namespace reason

/// Builds an error. `message` is one sentence with the values last.
Status MakeError(StatusCode code, std::string_view message, const ErrorFields& fields);

/// Same, with an fmt-style message and only a reason and a remedy.
template <typename... Args>
Status Error(StatusCode code, std::string_view reason, std::string_view remedy,
             fmt::format_string<Args...> format, Args&&... args) {
  ErrorFields fields;
  fields.reason = std::string(reason);
  fields.remedy = std::string(remedy);
  return MakeError(code, fmt::format(format, std::forward<Args>(args)...), fields);
}

/// The fields of an error; all empty for OK and for errors made elsewhere (then reason is
/// INTERNAL).
ErrorFields FieldsOf(const Status& status);

/// The message as a std::string.
std::string Message(const Status& status);

/// Returns `status` with every non-empty field of `fields` that it does not have yet. OK stays OK.
Status WithFields(Status status, const ErrorFields& fields);
Status WithTensor(Status status, std::string_view tensor);
Status WithRank(Status status, std::string_view rank);
Status WithPhase(Status status, std::string_view phase);
Status WithPeer(Status status, std::string_view peer);
/// Returns `status` with this phase in place of its own. OK stays OK.
Status MovedToPhase(Status status, std::string_view phase);

}  // namespace weightd

#define WEIGHTD_CONCAT_INNER(a, b) a##b
#define WEIGHTD_CONCAT(a, b) WEIGHTD_CONCAT_INNER(a, b)

/// Returns from the enclosing function when the expression is an error.
#define WEIGHTD_RETURN_IF_ERROR(expr)                         \
  do {                                                        \
    if (auto weightd_status = (expr); !weightd_status.ok()) { \
      return weightd_status;                                  \
    }                                                         \
  } while (false)
// NOLINTBEGIN(bugprone-macro-parentheses): the arguments are a name and a declaration.
/// Declares or assigns `lhs` from a StatusOr, or returns its error.
#define WEIGHTD_ASSIGN_OR_RETURN(lhs, expr) \
  WEIGHTD_ASSIGN_OR_RETURN_IMPL(WEIGHTD_CONCAT(weightd_or_, __LINE__), lhs, expr)
#define WEIGHTD_ASSIGN_OR_RETURN_IMPL(tmp, lhs, expr) \
  auto tmp = (expr);                                  \
  if (!tmp.ok()) return std::move(tmp).status();      \
  lhs = *std::move(tmp)
// NOLINTEND(bugprone-macro-parentheses)
/// Aborts on a broken invariant of our own; never on input.
#define WEIGHTD_CHECK(condition)                                              \
  do {                                                                        \
    if (!(condition)) ::weightd::CheckFailed(#condition, __FILE__, __LINE__); \
  } while (false)

namespace weightd {
[[noreturn]] void CheckFailed(const char* condition, const char* file, int line);
}  // namespace weightd
