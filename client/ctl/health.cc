#include "client/ctl/health.h"

#include <fmt/format.h>

#include <set>

#include "client/ctl/table.h"
#include "daemon/wire/convert.h"

namespace weightd::ctl {

Health JudgeDaemon(const v1::GetStatusResponse& status) {
  if (status.draining()) return {false, "weightd is draining"};
  std::string spawned;
  for (const auto& worker : status.workers()) {
    const std::string owner =
        worker.owner().empty() ? "" : fmt::format(" (started by {})", Printable(worker.owner()));
    if (!worker.attached()) {
      return {false,
              fmt::format("worker {}{} is not attached{}", worker.device(), owner,
                          worker.last_exit().empty()
                              ? ""
                              : fmt::format(" (last exit: {})", Printable(worker.last_exit())))};
    }
    if (!owner.empty()) spawned += "; " + worker.device() + owner;
  }
  return {true, fmt::format("weightd {}, {} worker{}{}", status.daemon_version(),
                            status.workers_size(), status.workers_size() == 1 ? "" : "s", spawned)};
}

Health JudgeEngine(const v1::GetStatusResponse& status, const std::string& engine) {
  std::set<std::string> names;
  std::string ready;
  for (const auto& model : status.models()) {
    for (const auto& replica : model.engines()) {
      names.insert(replica.engine());
      if (replica.engine() != engine) continue;
      const std::string what =
          fmt::format("engine {} dp {} of model {} is {}", engine, replica.dp_rank(), model.model(),
                      StateName(replica.state()));
      if (!replica.ready()) {
        const std::string& why = replica.error().message();
        return {false, why.empty() ? fmt::format("{}, not ready", what)
                                   : fmt::format("{}: {}", what, why)};
      }
      ready +=
          fmt::format("{}{} with version {}", ready.empty() ? "" : "; ", what, replica.version());
    }
  }
  if (!ready.empty()) return {true, ready};
  return {false, fmt::format("no engine is called {}; known: {}", engine,
                             names.empty() ? "none" : fmt::format("{}", fmt::join(names, ", ")))};
}

}  // namespace weightd::ctl
