#include "daemon/worker/worker_main.h"

#include <dirent.h>
#include <grpcpp/grpcpp.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "daemon/base/log.h"
#include "daemon/base/version.h"
#include "daemon/worker/device_plane.h"
#include "daemon/worker/worker_core.h"
#include "weightd/v1/worker.grpc.pb.h"

namespace weightd {
namespace {

constexpr int kExitCannotStart = 1;
constexpr int kExitDeviceLost = 2;
constexpr milliseconds kConnectDeadline{5000};

/// For the signal handler: what the process leaves behind unless it is removed.
char socket_path_to_remove[128] = "";
char folder_to_remove[128] = "";

/// Ends the process without waiting for anything: a step may hang, and must not delay the end.
[[noreturn]] void Leave(int code) {
  if (socket_path_to_remove[0] != '\0') ::unlink(socket_path_to_remove);
  if (folder_to_remove[0] != '\0') ::rmdir(folder_to_remove);
  ::_exit(code);
}

/// SIGTERM comes from the kernel when the parent dies.
void HandleSignals() {
  struct sigaction leave {};
  leave.sa_handler = [](int) { Leave(0); };
  ::sigaction(SIGTERM, &leave, nullptr);
  ::signal(SIGINT, SIG_IGN);  // a terminal's Ctrl-C is the daemon's to handle: it drains first
  ::signal(SIGPIPE, SIG_IGN);
  sigset_t none;
  ::sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);  // the daemon blocks signals, and exec keeps that
}

/// Closes what a client's process leaves open in its child, beside the standard streams and `keep`.
void CloseInherited(int keep) {
  if (keep == STDERR_FILENO + 1 && ::syscall(SYS_close_range, keep + 1, ~0U, 0) == 0) return;
  DIR* const list = ::opendir("/proc/self/fd");
  if (list == nullptr) return;
  std::vector<int> open;
  while (const dirent* entry = ::readdir(list)) open.push_back(std::atoi(entry->d_name));
  for (const int fd : open) {
    if (fd > STDERR_FILENO && fd != keep && fd != ::dirfd(list)) ::close(fd);
  }
  ::closedir(list);
}

/// Ends the process when its owner is gone or does not want it any more: seen without a signal.
void FollowOwner(int owner_fd) {
  std::thread([owner_fd] {
    pollfd entry{owner_fd, 0, 0};  // POLLHUP alone
    while (::poll(&entry, 1, -1) < 0 && errno == EINTR) {
    }
    Leave(0);
  }).detach();
}

/// Every lent shared memory object costs a descriptor here.
void RaiseDescriptorLimit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  if (::setrlimit(RLIMIT_NOFILE, &limit) != 0) {
    spdlog::warn("limit of open files cannot be raised: error={}", std::strerror(errno));
  }
}

/// The stream to the daemon; reports come from several threads.
class DaemonStream {
 public:
  explicit DaemonStream(const std::string& address)
      : channel_(MakeChannel(address)), stub_(v1::WorkerService::NewStub(channel_)) {}

  /// False if the daemon cannot be reached.
  bool Open() {
    if (!channel_->WaitForConnected(std::chrono::system_clock::now() + kConnectDeadline)) {
      return false;
    }
    stream_ = stub_->Attach(&context_);
    return stream_ != nullptr;
  }
  void Write(const v1::WorkerReport& report) {
    const std::lock_guard lock(write_mutex_);
    if (!stream_->Write(report)) Leave(0);
  }
  bool Read(v1::WorkerCommand* command) { return stream_->Read(command); }

 private:
  static std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address) {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(-1);  // the daemon is trusted, and pages its plans
    arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
    return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
  }

  grpc::ClientContext context_;
  std::shared_ptr<grpc::Channel> channel_;  // gRPC's own type of ownership
  std::unique_ptr<v1::WorkerService::Stub> stub_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::WorkerReport, v1::WorkerCommand>> stream_;
  std::mutex write_mutex_;
};

v1::WorkerReport MakeHello(const WorkerOptions& options, const DevicePlane& plane) {
  char host[256] = "";
  ::gethostname(host, sizeof(host) - 1);
  v1::WorkerReport report;
  v1::WorkerHello& hello = *report.mutable_hello();
  hello.mutable_protocol()->set_major(kProtocolMajor);
  hello.mutable_protocol()->set_minor(kProtocolMinor);
  hello.set_host(host);
  hello.set_device(options.device);
  hello.set_pid(static_cast<uint32_t>(::getpid()));
  hello.set_socket_path(options.socket_path);
  hello.set_token(options.token);
  hello.set_nccl_version(plane.nccl_version);
  hello.set_nccl_problem(plane.nccl_problem);
  hello.mutable_peers()->Add(plane.peers.begin(), plane.peers.end());
  return report;
}

}  // namespace

int RunWorker(const WorkerOptions& options) {
  if (options.owner_fd >= 0) CloseInherited(options.owner_fd);
  InitLog(options.log_level, options.log_format, "worker " + options.device);
  const pid_t parent = ::getppid();
  PrepareEnvironment(options.device);
  HandleSignals();
  ::prctl(PR_SET_PDEATHSIG, SIGTERM);
  if (::getppid() != parent) {
    spdlog::error("worker has no parent: it ended while the worker began");
    return kExitCannotStart;
  }
  if (options.owner_fd >= 0) {
    const std::string folder = options.socket_path.substr(0, options.socket_path.rfind('/'));
    folder.copy(folder_to_remove, sizeof(folder_to_remove) - 1);
    FollowOwner(options.owner_fd);
  }
  RaiseDescriptorLimit();
  DaemonStream stream(options.daemon);
  if (!stream.Open()) {
    spdlog::error("worker cannot reach its daemon: address={}", options.daemon);
    return kExitCannotStart;
  }
  StatusOr<DevicePlane> plane = MakeDevicePlane(options.device, options.num_threads);
  if (!plane.ok()) {
    spdlog::error("worker cannot use its device: {} remedy: {}", Message(plane.status()),
                  FieldsOf(plane.status()).remedy);
    return kExitCannotStart;
  }
  WorkerCore::Options core_options;
  core_options.members.socket_path = options.socket_path;
  core_options.members.check_peer = options.check_peer;
  core_options.members.attach_deadline = milliseconds(options.attach_deadline_ms);
  core_options.members.mapper = plane->mapper;
  core_options.on_broken = [] {
    spdlog::error("worker ends: its GPU context is lost");
    Leave(kExitDeviceLost);
  };
  core_options.device = options.device;
  core_options.num_threads = options.num_threads;
  StatusOr<std::unique_ptr<WorkerCore>> core =
      WorkerCore::Create(core_options, std::move(plane->transports),
                         [&stream](v1::WorkerReport report) { stream.Write(report); });
  if (!core.ok()) {
    spdlog::error("worker cannot start: {}", Message(core.status()));
    return kExitCannotStart;
  }
  options.socket_path.copy(socket_path_to_remove, sizeof(socket_path_to_remove) - 1);
  stream.Write(MakeHello(options, *plane));
  v1::WorkerCommand command;
  while (stream.Read(&command)) (*core)->Handle(std::move(command));
  spdlog::info("daemon has closed the stream");
  Leave(0);
}

}  // namespace weightd
