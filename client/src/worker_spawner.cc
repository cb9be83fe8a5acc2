#include "client/src/worker_spawner.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "daemon/base/worker_command.h"

namespace weightd {
namespace {

constexpr char kFolderPattern[] = "/weightd-worker-XXXXXX";
constexpr char kSocketName[] = "/worker.sock";
constexpr char kXdgRuntimeDir[] = "XDG_RUNTIME_DIR=";
constexpr char kVisibleGpus[] = "CUDA_VISIBLE_DEVICES=";

std::string ValueOf(const std::vector<std::string>& environment, std::string_view variable) {
  for (const std::string& entry : environment) {
    if (entry.starts_with(variable)) return entry.substr(variable.size());
  }
  return "";
}

/// Both ends, above the standard streams, closed by exec and in forked children.
struct Line {
  ScopedFd ours, theirs;
  ForkTicket our_ticket, their_ticket;
};

StatusOr<Line> MakeLine() {
  int pair[2] = {-1, -1};
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) {
    return Error(StatusCode::kResourceExhausted, reason::kWorkerStart,
                 "raise the limit of open files (ulimit -n)", "no socket for the worker: {}",
                 std::strerror(errno));
  }
  Line line;
  for (int end = 0; end < 2; ++end) {
    ScopedFd fd(pair[end]);
    // The program may have closed its standard streams: their numbers are not for us.
    if (fd.get() <= STDERR_FILENO) fd = ScopedFd(::fcntl(fd.get(), F_DUPFD_CLOEXEC, 3));
    (end == 0 ? line.our_ticket : line.their_ticket) = ForkTicket(fd.get());
    (end == 0 ? line.ours : line.theirs) = std::move(fd);
  }
  return line;
}

}  // namespace

StatusOr<std::string> MakeSocketFolder(const std::string& xdg_runtime_dir) {
  int error = 0;
  for (const std::string& parent : {xdg_runtime_dir, std::string("/tmp")}) {
    std::string folder = parent + kFolderPattern;
    const size_t longest = folder.size() + sizeof(kSocketName);
    if (!parent.starts_with('/') || longest > sizeof(sockaddr_un::sun_path)) continue;
    if (::mkdtemp(folder.data()) != nullptr) return folder;  // mode 0700
    error = errno;
  }
  return Error(StatusCode::kFailedPrecondition, reason::kWorkerStart,
               "let this user write to $XDG_RUNTIME_DIR or to /tmp",
               "no directory for the worker's socket: XDG_RUNTIME_DIR={} /tmp: {}", xdg_runtime_dir,
               std::strerror(error));
}

/// One order and the child that serves it. The keeper's callbacks use the fields one at a time.
struct WorkerSpawner::Run {
  WorkerCommandLine command;
  std::string token;
  std::string folder;  // of the present child
  Line line;
  std::unique_ptr<ChildKeeper> keeper;  // last: its thread uses the rest
};

WorkerSpawner::WorkerSpawner(SpawnSettings settings, std::string daemon, EndFn on_end)
    : settings_(std::move(settings)), daemon_(std::move(daemon)), on_end_(std::move(on_end)) {}

void WorkerSpawner::Start(const v1::StartWorker& order, uint64_t number) {
  Stop();
  run_ = std::make_unique<Run>();
  Run* const run = run_.get();
  const v1::WorkerSettings& settings = order.settings();
  run->token = order.token();
  run->command.daemon = daemon_;
  run->command.device = order.device();
  run->command.threads = settings.threads();
  run->command.peer_check = settings.peer_check();
  run->command.attach_deadline = milliseconds(settings.register_within_ms());
  run->command.log_level = settings.log_level();
  run->command.log_format = settings.log_format();
  run->command.owner_fd = ChildKeeper::kPassedFd;
  ChildKeeper::Callbacks callbacks;
  callbacks.command = [this, run](uint32_t) -> StatusOr<ChildCommand> {
    WEIGHTD_ASSIGN_OR_RETURN(run->folder,
                             MakeSocketFolder(ValueOf(settings_.environment, kXdgRuntimeDir)));
    WEIGHTD_ASSIGN_OR_RETURN(run->line, MakeLine());
    run->command.socket_path = run->folder + kSocketName;
    auto environment = WorkerCommandLine::Environment(settings_.environment, run->token);
    // A worker maps the memory of peer GPUs, too, which may be hidden from the trainer.
    std::erase_if(environment, [](const auto& entry) { return entry.starts_with(kVisibleGpus); });
    return ChildCommand{.program = settings_.binary,
                        .arguments = run->command.Arguments(),
                        .environment = std::move(environment),
                        .detached = true,
                        .passed_fd = run->line.theirs.get()};
  };
  callbacks.on_start = [run](pid_t) {
    run->line.their_ticket = ForkTicket();
    run->line.theirs.Reset();
  };
  callbacks.clean_up = [run](uint32_t) {
    run->line = Line();
    if (run->folder.empty()) return;
    ::unlink((run->folder + kSocketName).c_str());
    ::rmdir(run->folder.c_str());
    run->folder.clear();
  };
  callbacks.on_exit = [this, number](pid_t, const std::string& how) { on_end_(number, how); };
  run->keeper = std::make_unique<ChildKeeper>(
      milliseconds(std::max<uint64_t>(settings.restart_backoff_ms(), 1)), std::move(callbacks));
  run->keeper->Start();
}

void WorkerSpawner::Kill() {
  if (run_ != nullptr) run_->keeper->Kill();
}

void WorkerSpawner::Stop() { run_.reset(); }

WorkerSpawner::~WorkerSpawner() = default;

}  // namespace weightd
