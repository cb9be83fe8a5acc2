#include "client/src/process_identity.h"

#include <sys/stat.h>
#include <unistd.h>

#include <string>

#include "daemon/base/version.h"

namespace weightd {

v1::ProcessIdentity ThisProcess() {
  v1::ProcessIdentity process;
  process.set_pid(static_cast<uint32_t>(::getpid()));
  struct stat file;
  if (::stat("/proc/self/ns/pid", &file) == 0) process.set_pid_namespace(file.st_ino);
  char host[256] = {};
  if (::gethostname(host, sizeof(host) - 1) == 0) process.set_host(host);
  process.set_client_version(std::string("weightd-client ") + kVersion);
  return process;
}

v1::ProtocolVersion ThisProtocol() {
  v1::ProtocolVersion protocol;
  protocol.set_major(kProtocolMajor);
  protocol.set_minor(kProtocolMinor);
  return protocol;
}

}  // namespace weightd
