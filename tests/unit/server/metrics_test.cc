#include "daemon/server/edge/metrics.h"

#include <catch2/catch.hpp>
#include <sstream>
#include <vector>

namespace weightd {
namespace {

bool HasLine(const std::string& text, const std::string& wanted) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line == wanted) return true;
  }
  return false;
}

TEST_CASE("every metric appears under its documented name and labels") {
  Metrics metrics("0.1.0", "none");
  metrics.ObservePhase("transfer", 0.02);
  metrics.AddTransferBytes("shm", 1000);
  metrics.AddTransferBytes("shm", 24);
  metrics.SetLastSuccess("llama", 1.5e9);
  metrics.CountFailure("PEER_LOST");
  metrics.CountVerifyMismatch();
  metrics.SetStagingBytes("host", 4096);
  metrics.CountWorkerRestart("host");
  metrics.SetWorkerUp("host", true);
  metrics.SetWorkerUp("host.1", false);
  metrics.ObservePlanCompile(0.3);
  metrics.SetEngine({"llama", "e0", 1}, "SERVING", 7);
  const std::string text = metrics.Text();
  CAPTURE(text);
  for (const char* line : {
           R"(weightd_build_info{cuda="none",version="0.1.0"} 1)",
           R"(weightd_sync_duration_seconds_count{phase="transfer"} 1)",
           R"(weightd_sync_duration_seconds_bucket{phase="transfer",le="0.01"} 0)",
           R"(weightd_sync_duration_seconds_bucket{phase="transfer",le="0.025"} 1)",
           R"(weightd_transfer_bytes_total{transport="shm"} 1024)",
           R"(weightd_last_success_timestamp_seconds{model="llama"} 1500000000)",
           R"(weightd_sync_failures_total{reason="PEER_LOST"} 1)",
           R"(weightd_verify_mismatch_total 1)",
           R"(weightd_staging_bytes{device="host"} 4096)",
           R"(weightd_worker_restarts_total{device="host"} 1)",
           R"(weightd_worker_up{device="host"} 1)",
           R"(weightd_worker_up{device="host.1"} 0)",
           R"(weightd_plan_compile_seconds_count 1)",
           R"(weightd_engine_weight_version{dp_rank="1",engine="e0",model="llama"} 7)",
           R"(weightd_engine_state{dp_rank="1",engine="e0",model="llama",state="SERVING"} 1)",
           R"(weightd_engine_state{dp_rank="1",engine="e0",model="llama",state="POISONED"} 0)",
       }) {
    INFO(line);
    CHECK(HasLine(text, line));
  }
}

TEST_CASE("counters that have not counted are there from the start") {
  const std::string text = Metrics("0.1.0", "none").Text();
  CHECK(HasLine(text, "weightd_verify_mismatch_total 0"));
  CHECK(HasLine(text, "weightd_plan_compile_seconds_count 0"));
}

TEST_CASE("an engine is in one state at a time and leaves no series behind") {
  Metrics metrics("0.1.0", "none");
  metrics.SetEngine({"m", "e", 0}, "SERVING", 1);
  metrics.SetEngine({"m", "f", 0}, "SERVING", 1);
  metrics.SetEngine({"m", "e", 0}, "POISONED", 2);
  const std::string before = metrics.Text();
  CHECK(HasLine(before,
                R"(weightd_engine_state{dp_rank="0",engine="e",model="m",state="SERVING"} 0)"));
  CHECK(HasLine(before,
                R"(weightd_engine_state{dp_rank="0",engine="e",model="m",state="POISONED"} 1)"));
  metrics.RemoveEngine({"m", "e", 0});
  metrics.RemoveEngine({"m", "never", 0});
  const std::string after = metrics.Text();
  CHECK(after.find("engine=\"e\"") == std::string::npos);
  CHECK(after.find("engine=\"f\"") != std::string::npos);
}

TEST_CASE("names that clients choose are escaped") {
  Metrics metrics("0.1.0", "none");
  metrics.SetLastSuccess("a\"b\nc", 1);
  CHECK(HasLine(metrics.Text(), R"(weightd_last_success_timestamp_seconds{model="a\"b\nc"} 1)"));
}

TEST_CASE("a worker that a client had started leaves no series behind") {
  Metrics metrics("0.1.0", "none");
  metrics.SetWorkerUp("host", true);
  metrics.SetSpawnedWorkers({{"host.1", true}, {"host.2", false}});
  CHECK(HasLine(metrics.Text(), R"(weightd_worker_up{device="host.1"} 1)"));
  CHECK(HasLine(metrics.Text(), R"(weightd_worker_up{device="host.2"} 0)"));
  metrics.SetSpawnedWorkers({{"host.2", true}});
  CHECK(metrics.Text().find("host.1") == std::string::npos);
  CHECK(HasLine(metrics.Text(), R"(weightd_worker_up{device="host.2"} 1)"));
  CHECK(HasLine(metrics.Text(), R"(weightd_worker_up{device="host"} 1)"));
}

}  // namespace
}  // namespace weightd
