// The commands of weightctl that ask a daemon. Each prints its result or its error and returns the
// exit code.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "client/ctl/exit_code.h"
#include "client/ctl/output.h"

namespace weightd::ctl {

/// What every command takes.
struct GlobalOptions {
  std::string address = "unix:/run/weightd/weightd.sock";
  std::chrono::milliseconds timeout{5000};
  Format format = Format::kTable;
  bool color = false;

  TextStyle Style() const { return {.wide = format == Format::kWide, .color = color}; }
};

struct WatchOptions {
  bool watch = false;  ///< repeat until interrupted, redrawing on a terminal
  std::chrono::milliseconds interval{500};
};

struct PlanOptions {
  std::string model;   ///< empty: the only model there is
  std::string tensor;  ///< only tensors whose name contains this
  uint32_t limit = 0;  ///< 0: the daemon's default
};

/// `model` empty means all models.
ExitCode RunStatus(const GlobalOptions& global, const std::string& model,
                   const WatchOptions& watch);
ExitCode RunEngines(const GlobalOptions& global, const std::string& model);
ExitCode RunVersions(const GlobalOptions& global, const std::string& model);
/// `engine` empty means the daemon itself.
ExitCode RunHealth(const GlobalOptions& global, const std::string& model,
                   const std::string& engine);
ExitCode RunPlanShow(const GlobalOptions& global, const PlanOptions& plan);
/// Needs no daemon.
ExitCode RunVersion(const GlobalOptions& global);

}  // namespace weightd::ctl
