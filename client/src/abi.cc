// The C ABI: reads the caller's structures and hands out errors and strings. No policy.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "client/include/weightd/weightd.h"
#include "client/src/actor_client.h"
#include "client/src/engine_client.h"
#include "client/src/fork_guard.h"
#include "client/src/gpu_memory.h"
#include "client/src/worker_binary.h"
#include "daemon/base/version.h"

struct weightd_error {
  int code = 0;
  weightd::ErrorFields fields;
  std::string message;
  std::string result;
};

struct weightd_actor {
  std::unique_ptr<weightd::ActorClient> session;
};

struct weightd_engine {
  std::unique_ptr<weightd::EngineClient> session;
};

namespace weightd {
namespace {

constexpr int kDefaultConnectTimeoutMs = 10'000;

weightd_error* ToError(const Status& status, std::string result_json = "") {
  if (status.ok()) return nullptr;
  return new weightd_error{static_cast<int>(status.code()), FieldsOf(status), Message(status),
                           std::move(result_json)};
}

Status Forked() {
  return Error(
      StatusCode::kFailedPrecondition, reason::kForked,
      "use it in the process that made it; start processes that need their own by spawn or exec",
      "object was made before fork() and belongs to the parent process");
}

Status Missing(std::string_view what) {
  return Error(StatusCode::kInvalidArgument, reason::kConfig, "pass the option when opening",
               "option is missing or out of range: {}", what);
}

std::string Text(const char* text) { return text == nullptr ? "" : text; }

char* CopyOut(const std::string& text) {
  char* copy = static_cast<char*>(std::malloc(text.size() + 1));
  if (copy != nullptr) std::memcpy(copy, text.c_str(), text.size() + 1);
  return copy;
}

/// Of weightd_actor_options or weightd_engine_options.
template <typename Options>
StatusOr<SessionSettings> ReadSettings(const Options& options) {
  SessionSettings settings;
  if (options.worker == WEIGHTD_WORKER_SPAWN) {
    settings.spawn.emplace();
    WEIGHTD_ASSIGN_OR_RETURN(settings.spawn->binary,
                             FindWorkerBinary(PlacesHere(Text(options.worker_binary))));
    settings.spawn->environment = CopyEnvironment();
  } else if (options.worker != WEIGHTD_WORKER_DAEMON) {
    return Missing("worker");
  }
  WEIGHTD_ASSIGN_OR_RETURN(settings.address, ParseAddress(Text(options.address)));
  const bool given = options.connect_timeout_ms > 0;
  settings.connect_timeout =
      milliseconds(given ? options.connect_timeout_ms : kDefaultConnectTimeoutMs);
  return settings;
}

StatusOr<std::unique_ptr<ActorClient>> OpenActor(const weightd_actor_options& options) {
  WEIGHTD_ASSIGN_OR_RETURN(SessionSettings settings, ReadSettings(options));
  if (Text(options.model).empty()) return Missing("model");
  if (Text(options.group).empty()) return Missing("group");
  if (options.world_size < 1) return Missing("world_size");
  if (options.rank < 0 || options.rank >= options.world_size) return Missing("rank");
  WEIGHTD_RETURN_IF_ERROR(CheckRuntime());
  auto session = std::make_unique<ActorClient>(
      std::move(settings),
      ActorClient::Identity{.model = options.model,
                            .group = options.group,
                            .group_order = options.group_order,
                            .rank = static_cast<uint32_t>(options.rank),
                            .world_size = static_cast<uint32_t>(options.world_size),
                            .device = Text(options.device)});
  const Status opened = session->Open();
  if (opened.ok()) return session;
  session->Close();
  return WithRank(opened, fmt::format("actor {}", options.rank));
}

StatusOr<std::unique_ptr<EngineClient>> OpenEngine(const weightd_engine_options& options) {
  WEIGHTD_ASSIGN_OR_RETURN(SessionSettings settings, ReadSettings(options));
  settings.background = options.connect_timeout_ms < 0;
  settings.fence_on_link = true;
  if (Text(options.model).empty()) return Missing("model");
  if (Text(options.engine).empty()) return Missing("engine");
  if (Text(options.architecture).empty()) return Missing("architecture");
  if (Text(options.config_json).size() > static_cast<size_t>(kPageBytes)) {
    return Missing("config_json (at most 1 MiB)");
  }
  const auto size = [](int32_t value) { return value == 0 ? 1 : value; };
  EngineCoordinates coordinates{options.tp_rank,       size(options.tp_size), options.pp_rank,
                                size(options.pp_size), options.ep_rank,       size(options.ep_size),
                                options.dp_rank};
  const auto below = [](int rank, int limit) { return rank >= 0 && rank < limit; };
  if (!below(coordinates.tp_rank, coordinates.tp_size)) return Missing("tp_rank, tp_size");
  if (!below(coordinates.pp_rank, coordinates.pp_size)) return Missing("pp_rank, pp_size");
  if (!below(coordinates.ep_rank, coordinates.ep_size)) return Missing("ep_rank, ep_size");
  if (coordinates.dp_rank < 0) return Missing("dp_rank");
  const std::string mode = Text(options.commit_mode);
  WEIGHTD_RETURN_IF_ERROR(CheckRuntime());
  auto session = std::make_unique<EngineClient>(
      std::move(settings), EngineClient::Identity{.model = options.model,
                                                  .engine = options.engine,
                                                  .coordinates = coordinates,
                                                  .architecture = options.architecture,
                                                  .profile = Text(options.profile),
                                                  .config_json = Text(options.config_json),
                                                  .commit_mode = mode.empty() ? "in_place" : mode,
                                                  .auto_quiesce = options.auto_quiesce != 0,
                                                  .device = Text(options.device)});
  const Status opened = session->Open();
  if (opened.ok()) return session;
  session->Close();
  return WithRank(opened, session->label());
}

/// The engine's own refusal, or OK.
Status Refusal(const char* message) {
  if (message == nullptr) return absl::OkStatus();
  return Error(StatusCode::kFailedPrecondition, reason::kEngineRefused,
               "see the engine's log; sync again once it can take weights", "{}", message);
}

std::vector<std::string> SplitList(const char* list) {
  std::vector<std::string> parts(1);
  for (const char c : Text(list)) {
    if (c == ',') {
      parts.emplace_back();
    } else {
      parts.back().push_back(c);
    }
  }
  std::erase(parts, "");
  return parts;
}

/// Ends a session; in a forked child its threads do not exist, so the object is left alone.
template <typename Session>
void CloseSession(std::unique_ptr<Session> session) {
  if (session == nullptr) return;
  if (!session->usable()) {
    static_cast<void>(session.release());
    return;
  }
  session->Close();
}

}  // namespace
}  // namespace weightd

using weightd::ToError;

const char* weightd_version(void) { return weightd::kVersion; }
int weightd_abi_version(void) { return WEIGHTD_ABI_VERSION; }

weightd_error* weightd_gpu_check(const void* address, uint64_t size_bytes) {
  return weightd::ToError(weightd::CheckLendable(address, size_bytes));
}

weightd_error* weightd_gpu_allocate(const void* like, uint64_t size_bytes, void** address) {
  const auto allocated = weightd::AllocateLendable(like, size_bytes);
  if (allocated.ok()) *address = *allocated;
  return weightd::ToError(allocated.status());
}

void weightd_gpu_free(void* address) {
  if (address != nullptr) weightd::FreeLendable(address);
}

int weightd_error_code(const weightd_error* error) { return error == nullptr ? 0 : error->code; }

const char* weightd_error_field(const weightd_error* error, const char* field) {
  if (error == nullptr || field == nullptr) return "";
  const std::pair<const char*, const std::string&> fields[] = {
      {"reason", error->fields.reason}, {"message", error->message},
      {"tensor", error->fields.tensor}, {"rank", error->fields.rank},
      {"phase", error->fields.phase},   {"peer", error->fields.peer},
      {"remedy", error->fields.remedy}, {"result", error->result}};
  for (const auto& [name, value] : fields) {
    if (std::strcmp(name, field) == 0) return value.c_str();
  }
  return "";
}

void weightd_error_free(weightd_error* error) { delete error; }
void weightd_string_free(char* text) { std::free(text); }

weightd_error* weightd_actor_open(const weightd_actor_options* options, weightd_actor** actor) {
  auto session = weightd::OpenActor(*options);
  if (!session.ok()) return ToError(session.status());
  *actor = new weightd_actor{*std::move(session)};
  return nullptr;
}

weightd_error* weightd_actor_register(weightd_actor* actor, const weightd_tensor* tensors,
                                      size_t num_tensors) {
  if (!actor->session->usable()) return ToError(weightd::Forked());
  return ToError(actor->session->Register({tensors, num_tensors}));
}

weightd_error* weightd_actor_sync_begin(weightd_actor* actor, const weightd_sync_options* options) {
  if (!actor->session->usable()) return ToError(weightd::Forked());
  return ToError(actor->session->SyncBegin(*options));
}

int weightd_actor_sync_wait(weightd_actor* actor, int timeout_ms, char** result_json,
                            weightd_error** error) {
  *result_json = nullptr;
  *error = nullptr;
  if (!actor->session->usable()) {
    *error = ToError(weightd::Forked());
    return 1;
  }
  auto outcome = actor->session->SyncWait(timeout_ms);
  if (!outcome.has_value()) return 0;
  if (outcome->status.ok()) {
    *result_json = weightd::CopyOut(outcome->result_json);
  } else {
    *error = ToError(outcome->status, std::move(outcome->result_json));
  }
  return 1;
}

void weightd_actor_sync_cancel(weightd_actor* actor) {
  if (actor->session->usable()) actor->session->Cancel();
}

char* weightd_actor_state(weightd_actor* actor) {
  return weightd::CopyOut(actor->session->usable() ? actor->session->StateJson() : "{}");
}

void weightd_actor_close(weightd_actor* actor) {
  if (actor == nullptr) return;
  weightd::CloseSession(std::move(actor->session));
  delete actor;
}

weightd_error* weightd_engine_open(const weightd_engine_options* options, weightd_engine** engine) {
  auto session = weightd::OpenEngine(*options);
  if (!session.ok()) return ToError(session.status());
  *engine = new weightd_engine{*std::move(session)};
  return nullptr;
}

weightd_error* weightd_engine_register(weightd_engine* engine, const weightd_param* params,
                                       size_t num_params) {
  if (!engine->session->usable()) return ToError(weightd::Forked());
  return ToError(engine->session->Register({params, num_params}, nullptr));
}

weightd_error* weightd_engine_register_traced(weightd_engine* engine, const weightd_param* params,
                                              size_t num_params, const weightd_trace* trace) {
  if (!engine->session->usable()) return ToError(weightd::Forked());
  return ToError(engine->session->Register({params, num_params}, trace));
}

char* weightd_engine_state(weightd_engine* engine) {
  return weightd::CopyOut(engine->session->usable() ? engine->session->StateJson() : "{}");
}

uint64_t weightd_engine_wait(weightd_engine* engine, uint64_t since, int timeout_ms) {
  return engine->session->usable() ? engine->session->Wait(since, timeout_ms) : since;
}

weightd_error* weightd_engine_quiesced(weightd_engine* engine, const char* error_message) {
  if (!engine->session->usable()) return ToError(weightd::Forked());
  return ToError(engine->session->Quiesced(weightd::Refusal(error_message)));
}

weightd_error* weightd_engine_converted(weightd_engine* engine, const char* error_message) {
  if (!engine->session->usable()) return ToError(weightd::Forked());
  return ToError(engine->session->Converted(weightd::Refusal(error_message)));
}

weightd_error* weightd_engine_committed(weightd_engine* engine, const char* caches_reset,
                                        const char* error_message) {
  if (!engine->session->usable()) return ToError(weightd::Forked());
  return ToError(engine->session->Committed(weightd::Refusal(error_message),
                                            weightd::SplitList(caches_reset)));
}

void weightd_engine_close(weightd_engine* engine) {
  if (engine == nullptr) return;
  weightd::CloseSession(std::move(engine->session));
  delete engine;
}
