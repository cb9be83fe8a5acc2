#include "client/src/control_stream.h"

#include <grpcpp/create_channel_posix.h>

#include "daemon/base/version.h"

namespace weightd {
namespace {

// A daemon that is stopped or cut off counts as lost after 15 s at most, one that a busy machine
// keeps from running for less than 10 s does not. The daemon allows a ping every two seconds.
constexpr int kPingEveryMs = 5'000;
constexpr int kPingTimeoutMs = 10'000;

}  // namespace

std::shared_ptr<grpc::Channel> ChannelOver(Socket* socket) {
  EnterRuntime();
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  arguments.SetMaxSendMessageSize(kMaxMessageBytes);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kPingEveryMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kPingTimeoutMs);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  arguments.SetString(GRPC_ARG_DEFAULT_AUTHORITY, "weightd");
  return grpc::CreateCustomInsecureChannelFromFd("weightd", socket->fd.Release(), arguments);
}

Status StreamEnded(const grpc::Status& status, const std::string& address) {
  const std::string peer = "daemon " + address;
  switch (status.error_code()) {
    case grpc::StatusCode::UNIMPLEMENTED:
      return MakeError(StatusCode::kFailedPrecondition,
                       "the daemon does not know this client's service: " + status.error_message(),
                       {.reason = reason::kProtocolVersion,
                        .peer = peer,
                        .remedy = "use the daemon and the client library of one release"});
    case grpc::StatusCode::RESOURCE_EXHAUSTED:
      return MakeError(StatusCode::kResourceExhausted,
                       "a message to or from the daemon is too large: " + status.error_message(),
                       {.reason = reason::kMessageTooLarge,
                        .peer = peer,
                        .remedy = "use the daemon and the client library of one release"});
    default:
      return MakeError(
          StatusCode::kUnavailable,
          fmt::format("the daemon's connection ended: address={} cause={}", address,
                      status.ok() ? "closed by the daemon" : status.error_message()),
          {.reason = reason::kDaemonLost,
           .peer = peer,
           .remedy = "see the daemon's log; the client registers again by itself once it is back"});
  }
}

}  // namespace weightd
