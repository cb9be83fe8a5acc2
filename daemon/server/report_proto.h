// Domain values of the sync core <-> weightd.v1 messages.
#pragma once

#include "daemon/sync/ports.h"
#include "weightd/v1/actor.pb.h"
#include "weightd/v1/types.pb.h"
#include "weightd/v1/worker.pb.h"

namespace weightd {

v1::AttemptId ToProto(AttemptId attempt);
AttemptId FromProto(const v1::AttemptId& attempt);
v1::WorkerEndpoint ToProto(const WorkerEndpoint& endpoint);
v1::StartWorker ToProto(const WorkerOrder& order);
v1::StopWorker StopWorker(const std::string& device, bool again, const std::string& why);
v1::ReplicaOutcome ToProto(const ReplicaOutcome& outcome);
v1::SyncResult ToProto(const SyncReport& report);
v1::SyncProgress ToProto(const SyncProgress& progress);

/// The protocol of this build.
v1::ProtocolVersion OurProtocol();
/// \error FAILED_PRECONDITION PROTOCOL_VERSION naming both versions and which side is older
Status CheckProtocol(const v1::ProtocolVersion& theirs);
/// "pid 71 on host a (weightd-python 0.1.0)".
std::string Describe(const v1::ProcessIdentity& process);

/// Appends one page of shards. \error INVALID_ARGUMENT PROTOCOL if it is malformed
Status AppendShards(const v1::ShardsPage& page, RankShards& shards);

}  // namespace weightd
