#include "daemon/registry/version_ledger.h"

#include <catch2/catch.hpp>

namespace weightd {
namespace {

std::string Reason(const Status& status) { return status.ok() ? "" : FieldsOf(status).reason; }

TEST_CASE("versions only go up") {
  VersionLedger ledger;
  CHECK(Reason(ledger.Admit(0, true)) == reason::kStaleVersion);
  CHECK(ledger.Admit(3, true).ok());
  ledger.Consume(3, "a", 11);
  CHECK(Reason(ledger.Admit(2, true)) == reason::kStaleVersion);
  CHECK(ledger.Admit(4, false).ok());
}

TEST_CASE("an attempt that committed nowhere consumes nothing") {
  VersionLedger ledger(5);
  CHECK(ledger.Admit(6, true).ok());
  CHECK(ledger.Admit(6, true).ok());
  CHECK(ledger.highest() == 5);
}

TEST_CASE("a consumed version may be retried for replicas behind, with the same bytes") {
  VersionLedger ledger;
  ledger.Consume(1, "a", 11);
  CHECK(Reason(ledger.Admit(1, false)) == reason::kReusedVersion);
  CHECK(ledger.Admit(1, true).ok());
  CHECK(ledger.CheckRetry(1, "a", 11).ok());
  CHECK(Reason(ledger.CheckRetry(1, "a", 12)) == reason::kReusedVersion);
  CHECK(ledger.CheckRetry(1, "another layout", 12).ok());
}

TEST_CASE("what engines report after a restart counts") {
  VersionLedger ledger;
  ledger.Observe(9);
  CHECK(Reason(ledger.Admit(8, true)) == reason::kStaleVersion);
  ledger.Observe(4);
  CHECK(ledger.highest() == 9);
}

}  // namespace
}  // namespace weightd
