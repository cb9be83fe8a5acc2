#pragma once

#include "daemon/server/worker_stream.h"
#include "weightd/v1/admin.grpc.pb.h"

namespace weightd {

/// weightd.v1.AdminService: reads only.
class AdminService : public v1::AdminService::CallbackService {
 public:
  AdminService(Coordinator& coordinator, const WorkerSupervisors& supervisors,
               WorkerService& workers)
      : coordinator_(coordinator), supervisors_(supervisors), workers_(workers) {}

  grpc::ServerUnaryReactor* GetStatus(grpc::CallbackServerContext* call,
                                      const v1::GetStatusRequest* request,
                                      v1::GetStatusResponse* response) override;
  grpc::ServerUnaryReactor* GetPlan(grpc::CallbackServerContext* call,
                                    const v1::GetPlanRequest* request,
                                    v1::GetPlanResponse* response) override;

  void SetDraining() { draining_ = true; }
  bool draining() const { return draining_; }

 private:
  void DescribeWorkers(v1::GetStatusResponse& response);

  Coordinator& coordinator_;
  const WorkerSupervisors& supervisors_;
  WorkerService& workers_;
  const Clock::time_point start_ = Clock::now();
  std::atomic<bool> draining_{false};
};

/// The plan as weightctl shows it. `limit`: tensors listed at the most.
v1::GetPlanResponse DescribePlan(const PlanView& view, const std::string& tensor, uint32_t limit);

}  // namespace weightd
