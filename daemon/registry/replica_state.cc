#include "daemon/registry/replica_state.h"

#include "daemon/base/failpoint.h"

namespace weightd {
namespace {

using S = ReplicaState;
using E = ReplicaEvent;

struct Transition {
  S from;
  E event;
  S to;
};

// kFailedUntouched is not listed: it returns to the state before the attempt. kRankLost leads to
// kGone from anywhere.
constexpr Transition kTransitions[] = {
    {S::kGone, E::kCompleteClean, S::kServing},
    {S::kGone, E::kCompleteEmpty, S::kRegistered},
    {S::kGone, E::kCompleteDirty, S::kPoisoned},
    {S::kRegistered, E::kPrepare, S::kStaging},
    {S::kServing, E::kPrepare, S::kStaging},
    {S::kPoisoned, E::kPrepare, S::kStaging},
    {S::kRegistered, E::kCatchUp, S::kCatchingUp},
    {S::kPoisoned, E::kCatchUp, S::kCatchingUp},
    {S::kServing, E::kCatchUp, S::kCatchingUp},
    {S::kStaging, E::kVerified, S::kCommitting},
    {S::kCatchingUp, E::kVerified, S::kCommitting},
    {S::kCommitting, E::kCommitted, S::kServing},
    {S::kStaging, E::kFailedTouched, S::kPoisoned},
    {S::kCatchingUp, E::kFailedTouched, S::kPoisoned},
    {S::kCommitting, E::kFailedTouched, S::kPoisoned},
};

}  // namespace

std::string_view Name(ReplicaState state) {
  switch (state) {
    case S::kRegistered:
      return "REGISTERED";
    case S::kCatchingUp:
      return "CATCHING_UP";
    case S::kServing:
      return "SERVING";
    case S::kStaging:
      return "STAGING";
    case S::kCommitting:
      return "COMMITTING";
    case S::kPoisoned:
      return "POISONED";
    case S::kGone:
      return "GONE";
  }
  return "UNKNOWN";
}

std::string_view Name(ReplicaEvent event) {
  constexpr std::string_view kNames[] = {
      "complete clean", "complete empty", "complete dirty",   "prepare",        "catch up",
      "verified",       "committed",      "failed untouched", "failed touched", "rank lost"};
  return kNames[static_cast<size_t>(event)];
}

StatusOr<ReplicaState> Next(ReplicaState state, ReplicaEvent event, ReplicaState before) {
  if (event == E::kRankLost) return S::kGone;
  if (event == E::kFailedTouched && Mutated("forget_poison")) return before;
  const bool in_attempt = state == S::kStaging || state == S::kCatchingUp;
  if (event == E::kFailedUntouched && in_attempt) return before;
  if (state == S::kGone && (event == E::kFailedUntouched || event == E::kFailedTouched)) {
    return S::kGone;  // a rank died first; the attempt's end changes nothing
  }
  for (const Transition& transition : kTransitions) {
    if (transition.from == state && transition.event == event) return transition.to;
  }
  return Error(StatusCode::kInternal, reason::kInternal, "report this with the daemon's log",
               "replica has no transition: state={} event={}", Name(state), Name(event));
}

}  // namespace weightd
