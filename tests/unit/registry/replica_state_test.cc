#include "daemon/registry/replica_state.h"

#include <catch2/catch.hpp>

namespace weightd {
namespace {

using S = ReplicaState;
using E = ReplicaEvent;

TEST_CASE("a replica that commits goes from registered to serving") {
  S state = S::kRegistered;
  for (E event : {E::kPrepare, E::kVerified, E::kCommitted}) {
    StatusOr<S> next = Next(state, event, S::kRegistered);
    REQUIRE(next.ok());
    CHECK(!IsReady(state));
    state = *next;
  }
  CHECK(state == S::kServing);
  CHECK(IsReady(state));
}

TEST_CASE("an attempt that wrote nothing leaves the replica as it was") {
  for (S before : {S::kRegistered, S::kServing, S::kPoisoned}) {
    CHECK(*Next(S::kStaging, E::kFailedUntouched, before) == before);
    CHECK(*Next(S::kCatchingUp, E::kFailedUntouched, before) == before);
  }
}

TEST_CASE("an attempt that may have written poisons the replica, whatever it was before") {
  for (S in_attempt : {S::kStaging, S::kCatchingUp, S::kCommitting}) {
    CHECK(*Next(in_attempt, E::kFailedTouched, S::kServing) == S::kPoisoned);
  }
}

TEST_CASE(
    "a lost rank makes the replica gone from every state, and an attempt's end does not revive "
    "it") {
  for (S state : {S::kRegistered, S::kCatchingUp, S::kServing, S::kStaging, S::kCommitting,
                  S::kPoisoned, S::kGone}) {
    CHECK(*Next(state, E::kRankLost, S::kServing) == S::kGone);
  }
  CHECK(*Next(S::kGone, E::kFailedUntouched, S::kServing) == S::kGone);
  CHECK(*Next(S::kGone, E::kFailedTouched, S::kServing) == S::kGone);
}

TEST_CASE("only serving is ready") {
  for (S state :
       {S::kRegistered, S::kCatchingUp, S::kStaging, S::kCommitting, S::kPoisoned, S::kGone}) {
    CHECK_FALSE(IsReady(state));
  }
}

TEST_CASE("transitions that do not exist are refused") {
  CHECK_FALSE(Next(S::kRegistered, E::kCommitted, S::kRegistered).ok());
  CHECK_FALSE(Next(S::kStaging, E::kCommitted, S::kRegistered).ok());
  CHECK_FALSE(Next(S::kGone, E::kPrepare, S::kGone).ok());
  CHECK_FALSE(Next(S::kServing, E::kVerified, S::kServing).ok());
}

}  // namespace
}  // namespace weightd
