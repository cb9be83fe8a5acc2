#include "client/ctl/output.h"

#include <catch2/catch.hpp>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "client/ctl/quantity.h"
#include "weightd/v1/admin.pb.h"

namespace weightd::ctl {
namespace {

TEST_CASE("bytes, rates, times and counts are readable") {
  CHECK(HumanBytes(0) == "0 B");
  CHECK(HumanBytes(1023) == "1023 B");
  CHECK(HumanBytes(1024) == "1.00 KiB");
  CHECK(HumanBytes((1u << 20) - 1) == "1.00 MiB");
  CHECK(HumanBytes(1610612736) == "1.50 GiB");
  CHECK(HumanBytes(UINT64_MAX) == "16384.00 PiB");
  CHECK(HumanRate(0) == "-");
  CHECK(HumanRate(3.5 * 1024 * 1024) == "3.50 MiB/s");
  CHECK(HumanTime(0) == "0 us");
  CHECK(HumanTime(999) == "999 us");
  CHECK(HumanTime(1000) == "1.0 ms");
  CHECK(HumanTime(999'949) == "999.9 ms");
  CHECK(HumanTime(999'950) == "1.00 s");
  CHECK(HumanTime(59'994'999) == "59.99 s");
  CHECK(HumanTime(59'995'000) == "1m 00s");
  CHECK(HumanTime(125'000'000) == "2m 05s");
  CHECK(HumanTime(3'600'000'000) == "1h 00m");
  CHECK(HumanTime(86'400'000'000) == "1d 00h");
  CHECK(HumanCount(0) == "0");
  CHECK(HumanCount(999) == "999");
  CHECK(HumanCount(1000) == "1,000");
  CHECK(HumanCount(1234567) == "1,234,567");
}

TEST_CASE("an error as JSON has every field and the exit code") {
  const Status status = WithTensor(
      Error(StatusCode::kNotFound, "NO_PLAN", "start an engine", "no engine: {}", "m"), "a.weight");
  const auto json = nlohmann::json::parse(ErrorJson(status, ExitCode::kFailure));
  CHECK(json["exit_code"] == 1);
  CHECK(json["error"]["code"] == 5);
  CHECK(json["error"]["reason"] == "NO_PLAN");
  CHECK(json["error"]["message"] == "no engine: m");
  CHECK(json["error"]["tensor"] == "a.weight");
  CHECK(json["error"]["remedy"] == "start an engine");
  CHECK(json["error"]["peer"] == "");
  CHECK(json["error"].size() == 8);
}

TEST_CASE("an answer as JSON keeps the proto's names and shows defaults") {
  v1::GetStatusResponse status;
  status.set_uptime_us(5);
  const auto json = nlohmann::json::parse(ToJson(status, false));
  CHECK(json["uptime_us"] == "5");
  CHECK(json["draining"] == false);
  CHECK(json["models"].is_array());
  const std::string line = ToJson(status, true);
  CHECK(line.find('\n') == line.size() - 1);
}

TEST_CASE("exit codes follow the reason") {
  const auto code = [](StatusCode c, const char* why) {
    return ExitCodeOf(Error(c, why, "", "x"));
  };
  CHECK(ExitCodeOf(absl::OkStatus()) == ExitCode::kOk);
  CHECK(code(StatusCode::kUnavailable, reason::kDaemonLost) == ExitCode::kUnreachable);
  CHECK(code(StatusCode::kDeadlineExceeded, reason::kDeadline) == ExitCode::kTimeout);
  CHECK(code(StatusCode::kUnavailable, reason::kDraining) == ExitCode::kFailure);
}

TEST_CASE("colour is used when asked for, and by itself only on a terminal") {
  CHECK(UseColor("always"));
  CHECK_FALSE(UseColor("never"));
  setenv("NO_COLOR", "1", 1);
  CHECK_FALSE(UseColor("auto"));
  CHECK(UseColor("always"));
  unsetenv("NO_COLOR");
}

}  // namespace
}  // namespace weightd::ctl
