#include "client/src/result_json.h"

#include "daemon/wire/convert.h"

namespace weightd {

using json = nlohmann::ordered_json;

json ErrorJson(const Status& status) {
  if (status.ok()) return nullptr;
  const ErrorFields fields = FieldsOf(status);
  return {{"code", static_cast<int>(status.code())},
          {"reason", fields.reason},
          {"message", Message(status)},
          {"tensor", fields.tensor},
          {"rank", fields.rank},
          {"phase", fields.phase},
          {"peer", fields.peer},
          {"remedy", fields.remedy}};
}

std::string AttemptText(const v1::AttemptId& attempt) {
  if (attempt.epoch() == 0 && attempt.counter() == 0) return "";
  return fmt::format("{}.{}", attempt.epoch(), attempt.counter());
}

json ResultJson(const v1::SyncResult& result) {
  json phases = json::object();
  for (const v1::PhaseTime& time : result.phases()) {
    phases[PhaseName(time.phase())] = time.duration_us();
  }
  json replicas = json::array();
  for (const v1::ReplicaOutcome& replica : result.replicas()) {
    json caches = json::array();
    for (const std::string& cache : replica.caches_reset()) caches.push_back(cache);
    replicas.push_back({{"engine", replica.engine()},
                        {"dp_rank", replica.dp_rank()},
                        {"committed", replica.committed()},
                        {"version", replica.version()},
                        {"state", StateName(replica.state())},
                        {"verified", replica.verified()},
                        {"caches_reset", std::move(caches)},
                        {"error", ErrorJson(FromProto(replica.error()))}});
  }
  const std::map<std::string, uint64_t> paths(result.path_bytes().begin(),
                                              result.path_bytes().end());
  return {{"version", result.version()},    {"attempt", AttemptText(result.attempt())},
          {"bytes", result.bytes()},        {"path_bytes", paths},
          {"pause_us", result.pause_us()},  {"phases", std::move(phases)},
          {"replicas", std::move(replicas)}};
}

std::string Dump(const json& value) {
  return value.dump(-1, ' ', false, json::error_handler_t::replace);
}

}  // namespace weightd
