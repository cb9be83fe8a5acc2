#include "daemon/server/report_proto.h"

#include "daemon/base/version.h"
#include "daemon/wire/convert.h"

namespace weightd {

v1::AttemptId ToProto(AttemptId attempt) {
  v1::AttemptId proto;
  proto.set_epoch(attempt.epoch);
  proto.set_counter(attempt.counter);
  return proto;
}

AttemptId FromProto(const v1::AttemptId& attempt) { return {attempt.epoch(), attempt.counter()}; }

v1::WorkerEndpoint ToProto(const WorkerEndpoint& endpoint) {
  v1::WorkerEndpoint proto;
  proto.set_socket_path(endpoint.socket_path);
  proto.set_token(endpoint.token);
  proto.set_member(Value(endpoint.member));
  proto.set_device(endpoint.device);
  return proto;
}

v1::StartWorker ToProto(const WorkerOrder& order) {
  const auto count = [](milliseconds time) { return static_cast<uint64_t>(time.count()); };
  v1::StartWorker proto;
  proto.set_device(order.device);
  proto.set_token(order.token);
  proto.set_attach_within_ms(count(order.settings.attach_within));
  v1::WorkerSettings& settings = *proto.mutable_settings();
  settings.set_threads(static_cast<uint32_t>(order.settings.threads));
  settings.set_peer_check(order.settings.peer_check);
  settings.set_register_within_ms(count(order.settings.register_within));
  settings.set_restart_backoff_ms(count(order.settings.restart_backoff));
  settings.set_log_level(order.settings.log_level);
  settings.set_log_format(order.settings.log_format);
  return proto;
}

v1::StopWorker StopWorker(const std::string& device, bool again, const std::string& why) {
  v1::StopWorker proto;
  proto.set_device(device);
  proto.set_again(again);
  proto.set_reason(why);
  return proto;
}

v1::ReplicaOutcome ToProto(const ReplicaOutcome& outcome) {
  v1::ReplicaOutcome proto;
  proto.set_engine(outcome.engine);
  proto.set_dp_rank(static_cast<uint32_t>(outcome.dp_rank));
  proto.set_committed(outcome.committed);
  proto.set_version(outcome.version);
  proto.set_state(static_cast<v1::EngineState>(outcome.state));
  if (!outcome.error.ok()) *proto.mutable_error() = ToProto(outcome.error);
  proto.set_verified(outcome.verified);
  for (const std::string& cache : outcome.caches_reset) proto.add_caches_reset(cache);
  return proto;
}

v1::SyncResult ToProto(const SyncReport& report) {
  v1::SyncResult proto;
  proto.set_version(report.version);
  *proto.mutable_attempt() = ToProto(report.attempt);
  for (const ReplicaOutcome& outcome : report.replicas) *proto.add_replicas() = ToProto(outcome);
  for (const auto& [phase, micros] : report.phases) {
    v1::PhaseTime* time = proto.add_phases();
    time->set_phase(static_cast<v1::Phase>(phase));
    time->set_duration_us(micros);
  }
  proto.set_bytes(report.bytes);
  proto.set_pause_us(report.pause_us);
  proto.mutable_path_bytes()->insert(report.path_bytes.begin(), report.path_bytes.end());
  if (!report.error.ok()) *proto.mutable_error() = ToProto(report.error);
  return proto;
}

v1::SyncProgress ToProto(const SyncProgress& progress) {
  v1::SyncProgress proto;
  proto.set_phase(static_cast<v1::Phase>(progress.phase));
  *proto.mutable_attempt() = ToProto(progress.attempt);
  proto.set_bytes_done(progress.bytes_done);
  proto.set_bytes_total(progress.bytes_total);
  return proto;
}

v1::ProtocolVersion OurProtocol() {
  v1::ProtocolVersion version;
  version.set_major(kProtocolMajor);
  version.set_minor(kProtocolMinor);
  return version;
}

Status CheckProtocol(const v1::ProtocolVersion& theirs) {
  if (theirs.major() == kProtocolMajor && theirs.minor() <= kProtocolMinor) return absl::OkStatus();
  const bool newer = theirs.major() > kProtocolMajor ||
                     (theirs.major() == kProtocolMajor && theirs.minor() > kProtocolMinor);
  return Error(
      StatusCode::kFailedPrecondition, reason::kProtocolVersion,
      newer ? "upgrade the daemon, or use an older client library" : "upgrade the client library",
      "client speaks protocol {}.{}, the daemon {} speaks {}.{}", theirs.major(), theirs.minor(),
      kVersion, kProtocolMajor, kProtocolMinor);
}

std::string Describe(const v1::ProcessIdentity& process) {
  return fmt::format("pid {} on {} ({})", process.pid(), process.host(), process.client_version());
}

Status AppendShards(const v1::ShardsPage& page, RankShards& shards) {
  for (const v1::Box& proto : page.boxes()) {
    WEIGHTD_ASSIGN_OR_RETURN(const Box box, FromProto(proto));
    shards.boxes.push_back(box);
  }
  int next = 0;
  for (uint32_t count : page.boxes_per_tensor()) {
    for (uint32_t i = 0; i < count; ++i) {
      if (next >= page.box_index_size() || page.box_index(next) >= shards.boxes.size()) {
        return Error(StatusCode::kInvalidArgument, reason::kProtocol,
                     "use the client library of this release", "shards page refers to no box");
      }
      shards.box_index.push_back(page.box_index(next++));
    }
    shards.first.push_back(static_cast<uint32_t>(shards.box_index.size()));
  }
  return absl::OkStatus();
}

}  // namespace weightd
