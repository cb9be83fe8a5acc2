// The client side of AdminService: one channel, unary calls with a deadline.
#pragma once

#include <chrono>
#include <memory>
#include <string>

#include "daemon/base/status.h"
#include "weightd/v1/admin.grpc.pb.h"

namespace weightd::ctl {

/// Talks to one daemon. Thread safety: all calls may be made from any thread.
class AdminClient {
 public:
  /// `address`: "unix:/path", "/path" or "host:port". Connects at the first call. `timeout` bounds
  /// each call as a whole.
  AdminClient(std::string address, std::chrono::milliseconds timeout);

  /// \error UNAVAILABLE DAEMON_LOST if nothing answers at the address
  /// \error DEADLINE_EXCEEDED DEADLINE if there is no answer in time
  /// \error whatever the daemon answers, with its fields
  StatusOr<v1::GetStatusResponse> GetStatus(const v1::GetStatusRequest& request);
  StatusOr<v1::GetPlanResponse> GetPlan(const v1::GetPlanRequest& request);

 private:
  Status ToStatus(const grpc::Status& status) const;

  std::string address_;
  std::chrono::milliseconds timeout_;
  std::unique_ptr<v1::AdminService::Stub> stub_;
};

}  // namespace weightd::ctl
