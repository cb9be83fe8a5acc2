#include "daemon/worker/gpu_list.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <sstream>

#include "daemon/base/scoped_fd.h"
#include "daemon/device/cuda/driver.h"

extern char** environ;

namespace weightd {
namespace {

StatusOr<std::vector<std::string>> ListGpus() {
  WEIGHTD_ASSIGN_OR_RETURN(const cuda::Driver* driver, cuda::LoadDriver());
  return cuda::ListDevices(*driver);
}

Status NoGpus(std::string_view cause) {
  return Error(StatusCode::kFailedPrecondition, reason::kDevice,
               "install the NVIDIA driver and give the daemon access to the GPUs, or name other "
               "devices in worker.devices",
               "worker.devices has \"gpu\", but this machine has no usable GPU: {}", cause);
}

}  // namespace

int PrintGpus() {
  const auto gpus = ListGpus();
  if (!gpus.ok()) {
    std::fprintf(stderr, "weightd: %s\n", Message(gpus.status()).c_str());
    return 1;
  }
  for (const std::string& gpu : *gpus) std::puts(gpu.c_str());
  return 0;
}

StatusOr<std::vector<std::string>> AskForGpus() {
  int pipe[2];
  if (::pipe2(pipe, O_CLOEXEC) != 0) return NoGpus("no descriptors");
  const ScopedFd from(pipe[0]);
  ScopedFd to(pipe[1]);
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, to.get(), STDOUT_FILENO);
  std::string name = "weightd", option = "--list-gpus";
  char* argv[] = {name.data(), option.data(), nullptr};
  pid_t pid = 0;
  const int error = ::posix_spawn(&pid, "/proc/self/exe", &actions, nullptr, argv, environ);
  ::posix_spawn_file_actions_destroy(&actions);
  if (error != 0) return NoGpus("its list cannot be asked for");
  to.Reset();
  std::string text;
  char buffer[4096];
  for (ssize_t size = 0; (size = ::read(from.get(), buffer, sizeof(buffer))) != 0;) {
    if (size > 0) text.append(buffer, static_cast<size_t>(size));
    if (size < 0 && errno != EINTR) break;
  }
  int status = 0;
  while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  std::vector<std::string> gpus;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) gpus.push_back(line);
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) return NoGpus("the driver cannot be used");
  if (gpus.empty()) return NoGpus("the driver sees none");
  return gpus;
}

}  // namespace weightd
