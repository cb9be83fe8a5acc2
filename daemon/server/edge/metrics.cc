#include "daemon/server/edge/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <map>
#include <mutex>
#include <vector>

namespace weightd {
namespace {

using prometheus::Counter;
using prometheus::Family;
using prometheus::Gauge;
using prometheus::Histogram;

// The names of weightd.v1.EngineState, so that a dashboard finds every state at 0 or 1.
constexpr const char* kStates[] = {"REGISTERED", "CATCHING_UP", "SERVING", "STAGING",
                                   "COMMITTING", "POISONED",    "GONE"};

// Seconds: from the fixed cost of an empty phase to a deadline.
const Histogram::BucketBoundaries kPhaseBuckets = {0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025,
                                                   0.05,   0.1,   0.25,   0.5,   1.0,  2.5,
                                                   5.0,    10.0,  30.0,   60.0,  300.0};

std::string Label(std::string_view text) { return std::string(text); }

template <typename Builder>
auto& Register(Builder builder, const char* name, const char* help, prometheus::Registry& to) {
  return builder.Name(name).Help(help).Register(to);
}

}  // namespace

struct Metrics::Impl {
  struct EngineSeries {
    Gauge* version;
    std::vector<Gauge*> states;  // as kStates
  };

  prometheus::Registry registry;
  Family<Histogram>& phase =
      Register(prometheus::BuildHistogram(), "weightd_sync_duration_seconds",
               "Time that a phase of a sync took; phase \"total\" is the whole sync.", registry);
  Family<Counter>& bytes =
      Register(prometheus::BuildCounter(), "weightd_transfer_bytes_total",
               "Bytes landed in engine memory, by the path that they took.", registry);
  Family<Gauge>& version =
      Register(prometheus::BuildGauge(), "weightd_engine_weight_version",
               "Version of the weights that a replica holds; 0 when none.", registry);
  Family<Gauge>& state = Register(prometheus::BuildGauge(), "weightd_engine_state",
                                  "1 for the state that a replica is in, 0 for others.", registry);
  Family<Counter>& failures = Register(prometheus::BuildCounter(), "weightd_sync_failures_total",
                                       "Syncs that failed, by reason.", registry);
  Family<Counter>& mismatches =
      Register(prometheus::BuildCounter(), "weightd_verify_mismatch_total",
               "Replicas whose digests differed from the source's.", registry);
  Family<Gauge>& staging = Register(prometheus::BuildGauge(), "weightd_staging_bytes",
                                    "Bytes of a worker's staging ring in use.", registry);
  Family<Gauge>& build = Register(prometheus::BuildGauge(), "weightd_build_info",
                                  "Always 1; the labels describe the build.", registry);
  Family<Gauge>& success =
      Register(prometheus::BuildGauge(), "weightd_last_success_timestamp_seconds",
               "When a sync of a model last succeeded, in seconds since 1970.", registry);
  Family<Counter>& restarts =
      Register(prometheus::BuildCounter(), "weightd_worker_restarts_total",
               "Workers that were started again after they died.", registry);
  Family<Gauge>& worker_up =
      Register(prometheus::BuildGauge(), "weightd_worker_up",
               "1 while the worker of a device is attached, 0 otherwise.", registry);
  Family<Histogram>& compile =
      Register(prometheus::BuildHistogram(), "weightd_plan_compile_seconds",
               "Time to compile a transfer plan.", registry);

  Counter& all_mismatches = mismatches.Add({});
  Histogram& all_compiles = compile.Add({}, kPhaseBuckets);

  std::mutex mutex;
  std::map<Engine, EngineSeries> engines;  // guarded by mutex
  std::map<std::string, Gauge*> spawned;   // by device; guarded by mutex

  EngineSeries MakeSeries(const Engine& key) {
    const prometheus::Labels labels = {
        {"model", key.model}, {"engine", key.engine}, {"dp_rank", std::to_string(key.dp_rank)}};
    EngineSeries series{&version.Add(labels), {}};
    for (const char* name : kStates) {
      prometheus::Labels with_state = labels;
      with_state.emplace("state", name);
      series.states.push_back(&state.Add(with_state));
    }
    return series;
  }
};

Metrics::Metrics(std::string_view version, std::string_view cuda)
    : impl_(std::make_unique<Impl>()) {
  impl_->build.Add({{"version", Label(version)}, {"cuda", Label(cuda)}}).Set(1);
}

Metrics::~Metrics() = default;

void Metrics::ObservePhase(std::string_view phase, double seconds) {
  impl_->phase.Add({{"phase", Label(phase)}}, kPhaseBuckets).Observe(seconds);
}

void Metrics::AddTransferBytes(std::string_view transport, uint64_t bytes) {
  impl_->bytes.Add({{"transport", Label(transport)}}).Increment(static_cast<double>(bytes));
}

void Metrics::SetLastSuccess(std::string_view model, double unix_seconds) {
  impl_->success.Add({{"model", Label(model)}}).Set(unix_seconds);
}

void Metrics::CountFailure(std::string_view reason) {
  impl_->failures.Add({{"reason", Label(reason)}}).Increment();
}

void Metrics::CountVerifyMismatch() { impl_->all_mismatches.Increment(); }

void Metrics::SetStagingBytes(std::string_view device, uint64_t bytes) {
  impl_->staging.Add({{"device", Label(device)}}).Set(static_cast<double>(bytes));
}

void Metrics::CountWorkerRestart(std::string_view device) {
  impl_->restarts.Add({{"device", Label(device)}}).Increment();
}

void Metrics::SetWorkerUp(std::string_view device, bool up) {
  impl_->worker_up.Add({{"device", Label(device)}}).Set(up ? 1 : 0);
}

void Metrics::SetSpawnedWorkers(const std::map<std::string, bool>& up) {
  const std::lock_guard lock(impl_->mutex);
  for (const auto& [device, is_up] : up) {
    Gauge*& series = impl_->spawned[device];
    if (series == nullptr) series = &impl_->worker_up.Add({{"device", Label(device)}});
    series->Set(is_up ? 1 : 0);
  }
  std::erase_if(impl_->spawned, [&](const auto& item) {
    if (up.contains(item.first)) return false;
    impl_->worker_up.Remove(item.second);
    return true;
  });
}

void Metrics::ObservePlanCompile(double seconds) { impl_->all_compiles.Observe(seconds); }

void Metrics::SetEngine(const Engine& engine, std::string_view state, uint64_t version) {
  std::lock_guard lock(impl_->mutex);
  auto found = impl_->engines.find(engine);
  if (found == impl_->engines.end()) {
    found = impl_->engines.emplace(engine, impl_->MakeSeries(engine)).first;
  }
  found->second.version->Set(static_cast<double>(version));
  for (size_t i = 0; i < std::size(kStates); ++i) {
    found->second.states[i]->Set(state == kStates[i] ? 1 : 0);
  }
}

void Metrics::RemoveEngine(const Engine& engine) {
  std::lock_guard lock(impl_->mutex);
  const auto found = impl_->engines.find(engine);
  if (found == impl_->engines.end()) return;
  impl_->version.Remove(found->second.version);
  for (Gauge* gauge : found->second.states) impl_->state.Remove(gauge);
  impl_->engines.erase(found);
}

std::string Metrics::Text() const {
  return prometheus::TextSerializer().Serialize(impl_->registry.Collect());
}

}  // namespace weightd
