// weightd: configuration -> server -> serve -> drain. The same binary is the worker (--worker).
#include <signal.h>
#include <systemd/sd-daemon.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "daemon/base/log.h"
#include "daemon/base/version.h"
#include "daemon/server/server.h"
#include "daemon/worker/gpu_list.h"
#include "daemon/worker/worker_main.h"

namespace {

int Fail(const weightd::Status& status) {
  const std::string remedy = weightd::FieldsOf(status).remedy;
  std::fprintf(stderr, "weightd: %s\n", weightd::Message(status).c_str());
  if (!remedy.empty()) std::fprintf(stderr, "weightd: remedy: %s\n", remedy.c_str());
  return 1;
}

// Blocks SIGTERM and SIGINT in every thread to come, so that Serve can wait for them.
sigset_t BlockSignals() {
  sigset_t signals;
  ::sigemptyset(&signals);
  ::sigaddset(&signals, SIGTERM);
  ::sigaddset(&signals, SIGINT);
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  ::signal(SIGPIPE, SIG_IGN);
  return signals;
}

/// Puts the UUIDs of all GPUs in the place of "gpu".
weightd::Status NameGpus(std::vector<std::string>* devices) {
  const auto all = std::find(devices->begin(), devices->end(), weightd::kAllGpus);
  if (all == devices->end()) return absl::OkStatus();
  WEIGHTD_ASSIGN_OR_RETURN(const std::vector<std::string> gpus, weightd::AskForGpus());
  const auto place = devices->erase(all);
  devices->insert(place, gpus.begin(), gpus.end());
  // One that was named as well is served once.
  std::vector<std::string> once;
  for (const std::string& device : *devices) {
    if (std::find(once.begin(), once.end(), device) == once.end()) once.push_back(device);
  }
  *devices = std::move(once);
  return absl::OkStatus();
}

int Serve(const weightd::Config& config) {
  const sigset_t signals = BlockSignals();
  weightd::StatusOr<std::unique_ptr<weightd::Server>> server = weightd::Server::Create(config);
  if (!server.ok()) return Fail(server.status());
  spdlog::info("weightd {} serves: socket={} tcp_port={} http_port={}", weightd::kVersion,
               config.listen.socket, (*server)->tcp_port(), (*server)->http_port());
  ::sd_notify(0, "READY=1");
  int signal = 0;
  ::sigwait(&signals, &signal);
  spdlog::info("draining: signal={}", signal);
  ::sd_notify(0, "STOPPING=1");
  (*server)->Drain();
  return 0;
}

}  // namespace

// NOLINTNEXTLINE(bugprone-exception-escape): out of memory at the start may end the daemon
int main(int argc, char** argv) {
  CLI::App app{"weightd moves the weights of a language model from its trainer to its engines.",
               "weightd"};
  weightd::ConfigSources sources;
  sources.environment = weightd::ProcessEnvironment();
  bool check = false;
  app.add_option("--config", sources.file, "configuration file (TOML); see configs/weightd.toml");
  app.add_option("--set", sources.sets, "section.key=value, wins over file and environment");
  app.add_flag("--check-config", check, "check the configuration and exit (0 = fine, 1 = not)");
  app.set_version_flag("--version", std::string("weightd ") + weightd::kVersion);
  weightd::WorkerOptions worker;
  bool is_worker = false, list_gpus = false;
  CLI::App* internal = app.add_option_group("internal", "");
  internal->group("");
  internal->add_flag("--worker", is_worker, "run as the worker of a daemon");
  internal->add_flag("--list-gpus", list_gpus, "");
  internal->add_option("--device", worker.device, "");
  internal->add_option("--daemon", worker.daemon, "");
  internal->add_option("--socket", worker.socket_path, "");
  internal->add_option("--threads", worker.num_threads, "");
  internal->add_option("--attach-deadline-ms", worker.attach_deadline_ms, "");
  internal->add_option("--log-level", worker.log_level, "");
  internal->add_option("--log-format", worker.log_format, "");
  internal->add_flag("!--no-peer-check", worker.check_peer, "");
  internal->add_option("--owner-fd", worker.owner_fd, "");
  CLI11_PARSE(app, argc, argv);

  if (is_worker) {
    weightd::InitLog(worker.log_level, worker.log_format, "worker " + worker.device);
    if (const char* token = std::getenv("WEIGHTD_WORKER_TOKEN")) worker.token = token;
    return weightd::RunWorker(worker);
  }
  if (list_gpus) return weightd::PrintGpus();
  weightd::StatusOr<weightd::Config> config = weightd::LoadConfig(sources);
  if (!config.ok()) return Fail(config.status());
  const weightd::Status named = NameGpus(&config->worker.devices);
  if (!named.ok()) return Fail(named);
  if (check) {
    if (const weightd::Status status = weightd::CheckEnvironment(*config); !status.ok()) {
      return Fail(status);
    }
    std::puts("configuration is fine");
    return 0;
  }
  weightd::InitLog(config->runtime.log_level, config->runtime.log_format, "daemon");
  return Serve(*config);
}
