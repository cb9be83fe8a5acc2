#include "client/ctl/admin_client.h"

#include <grpcpp/grpcpp.h>
#include <unistd.h>

#include <cerrno>

#include "daemon/wire/convert.h"

namespace weightd::ctl {
namespace {

// An answer with a plan of many tensors may be larger than gRPC's default of 4 MiB.
constexpr int kMaxAnswerBytes = 256 << 20;

std::string Target(const std::string& address) {
  return address.starts_with('/') ? "unix:" + address : address;
}

// The path of a unix socket, or an empty text.
std::string SocketPath(const std::string& target) {
  if (target.starts_with("unix://")) return target.substr(7);
  return target.starts_with("unix:") ? target.substr(5) : "";
}

// What to do when nothing answers.
std::string Remedy(const std::string& address) {
  const std::string path = SocketPath(Target(address));
  if (!path.empty() && access(path.c_str(), F_OK) != 0) {
    return errno == EACCES ? "run weightctl as a user who may enter the socket's directory"
                           : "there is no such socket: start weightd, or give its socket with "
                             "--address or WEIGHTD_ADDRESS";
  }
  if (!path.empty() && access(path.c_str(), W_OK) != 0) {
    return "run weightctl as a user who may write to the socket";
  }
  return "start weightd, or give its address with --address or WEIGHTD_ADDRESS";
}

std::shared_ptr<grpc::Channel> Connect(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxAnswerBytes);
  // http_proxy must not carry a loopback address elsewhere.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  return grpc::CreateCustomChannel(Target(address), grpc::InsecureChannelCredentials(), arguments);
}

}  // namespace

AdminClient::AdminClient(std::string address, std::chrono::milliseconds timeout)
    : address_(std::move(address)),
      timeout_(timeout),
      stub_(v1::AdminService::NewStub(Connect(address_))) {}

Status AdminClient::ToStatus(const grpc::Status& status) const {
  if (status.ok()) return absl::OkStatus();
  v1::ErrorDetail detail;
  if (detail.ParseFromString(status.error_details()) && detail.code() != 0) {
    return FromProto(detail);
  }
  if (status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED) {
    return Error(StatusCode::kDeadlineExceeded, reason::kDeadline,
                 "raise --timeout, or look into weightd's log",
                 "no answer from weightd in time: address={}, timeout={}ms", address_,
                 timeout_.count());
  }
  if (status.error_code() == grpc::StatusCode::UNAVAILABLE) {
    return Error(StatusCode::kUnavailable, reason::kDaemonLost, Remedy(address_),
                 "cannot reach weightd: address={}, cause={}", address_, status.error_message());
  }
  return Error(static_cast<StatusCode>(status.error_code()), reason::kProtocol,
               "check that weightctl and weightd are of the same version", "{}: address={}",
               status.error_message(), address_);
}

StatusOr<v1::GetStatusResponse> AdminClient::GetStatus(const v1::GetStatusRequest& request) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + timeout_);
  v1::GetStatusResponse response;
  WEIGHTD_RETURN_IF_ERROR(ToStatus(stub_->GetStatus(&context, request, &response)));
  return response;
}

StatusOr<v1::GetPlanResponse> AdminClient::GetPlan(const v1::GetPlanRequest& request) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + timeout_);
  v1::GetPlanResponse response;
  WEIGHTD_RETURN_IF_ERROR(ToStatus(stub_->GetPlan(&context, request, &response)));
  return response;
}

}  // namespace weightd::ctl
