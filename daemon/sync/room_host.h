#pragma once

#include <memory>
#include <string>
#include <vector>

#include "daemon/sync/coordinator.h"

namespace weightd {

/// A job's view of the coordinator: the SessionHost of one model and one trainer group.
/// Thread safety: every call locks the coordinator.
class RoomHost : public SessionHost {
 public:
  /// `group` may be nullptr for a catch-up.
  RoomHost(Coordinator& coordinator, ModelRoom& room, std::shared_ptr<ActorGroup> group)
      : coordinator_(coordinator), room_(room), group_(std::move(group)) {}

  const ActorGroup* group() const { return group_.get(); }

  GroupView ViewGroup() override;
  std::vector<ReplicaView> ViewReplicas() override;
  std::string IncompleteReplica() override;
  AttemptId NextAttempt() override;
  std::shared_ptr<WorkerPort> Worker(const std::string& device) override;
  Status AdmitVersion(uint64_t version) override;
  Status CheckRetry(uint64_t version, const std::string& layout, uint64_t digest) override;
  void ApplyReplica(const ReplicaView& view, ReplicaEvent event, const Status& error) override;
  void CommitReplica(const ReplicaView& view, uint64_t version, const std::string& layout,
                     uint64_t digest) override;
  void CommitCatchUp(const ReplicaView& view, uint64_t version) override;
  ReplicaState StateOf(const ReplicaView& view) override;
  Status ResolveLayouts(const GroupView& group, const ReplicaView& replica) override;
  StatusOr<std::shared_ptr<const ReplicaPlan>> PlanFor(const GroupView& group,
                                                       const ReplicaView& replica) override;
  bool Attached(MemberId member, const std::string& device) override;
  bool PlanLoaded(uint64_t handle, const std::string& device) override;
  void MarkPlanLoaded(uint64_t handle, const std::string& device) override;
  uint64_t FindWire(uint64_t plan) override { return room_.plans.FindWire(plan); }
  uint64_t NextWire() override;
  void KeepWire(uint64_t plan, uint64_t wire, const std::vector<std::string>& devices) override {
    room_.plans.KeepWire(plan, wire, devices);
  }
  void DropWire(uint64_t plan) override { room_.plans.DropWire(plan); }
  std::mutex& issue_mutex() override { return coordinator_.issue_mutex_; }
  void ReserveVersion(uint64_t version) override;
  void ShowProgress(const SyncProgress& progress, const std::string& waiting_for) override;
  const SyncOptions& options() const override { return coordinator_.config_.sync; }

 private:
  void Publish(const ReplicaView& view, uint64_t version);

  Coordinator& coordinator_;
  ModelRoom& room_;
  const std::shared_ptr<ActorGroup> group_;
};

}  // namespace weightd
