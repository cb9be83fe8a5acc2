#include "client/ctl/push.h"

#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <nlohmann/json.hpp>

#include "client/checkpoint/checkpoint.h"
#include "client/ctl/admin_client.h"
#include "client/ctl/push_progress.h"
#include "client/ctl/quantity.h"
#include "client/ctl/render.h"
#include "client/ctl/table.h"
#include "client/src/actor_client.h"
#include "daemon/wire/convert.h"

namespace weightd::ctl {
namespace {

using Json = nlohmann::ordered_json;

// How long pages of the files that were read stay resident: a few tens of MB at memory speed.
constexpr int kReleaseMs = 5;
// Releases between two looks at the sync.
constexpr int kLook = 20;

volatile std::sig_atomic_t interrupted = 0;

// What OnBusError says; set before it can run.
std::string truncated_message;
int truncated_fd = STDERR_FILENO;

// A file was truncated under the mapping. There is nothing to copy and no way back.
void OnBusError(int) {
  [[maybe_unused]] const ssize_t written =
      ::write(truncated_fd, truncated_message.data(), truncated_message.size());
  ::_exit(static_cast<int>(ExitCode::kFailure));
}

void CatchTruncation(const std::string& directory, Format format) {
  const Status truncated = Error(StatusCode::kAborted, reason::kCheckpoint,
                                 "push the directory again when nobody writes to it; engines may "
                                 "be POISONED until then",
                                 "a file was truncated while it was pushed: {}", directory);
  const bool json = format == Format::kJson;
  truncated_message = json ? ErrorJson(truncated, ExitCode::kFailure)
                           : "\nweightctl: " + RenderError(ToProto(truncated), 2);
  truncated_fd = json ? STDOUT_FILENO : STDERR_FILENO;
  struct sigaction bus {};
  bus.sa_handler = OnBusError;
  ::sigaction(SIGBUS, &bus, nullptr);
}

// Ctrl-C cancels the sync; a second one takes its usual effect.
void CatchInterrupts() {
  struct sigaction interrupt {};
  interrupt.sa_handler = [](int) { interrupted = 1; };
  interrupt.sa_flags = static_cast<int>(SA_RESETHAND);
  ::sigaction(SIGINT, &interrupt, nullptr);
  ::sigaction(SIGTERM, &interrupt, nullptr);
}

// One staged shard per tensor: nothing is lent, the worker's ring asks for parts.
Status Register(const Checkpoint& checkpoint, ActorClient* actor) {
  std::vector<weightd_shard> shards(checkpoint.tensors().size());
  std::vector<weightd_tensor> tensors(checkpoint.tensors().size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Checkpoint::Tensor& from = checkpoint.tensors()[i];
    const Shape& shape = from.info.shape;
    const Dims strides = RowMajorStrides(shape);
    weightd_tensor& tensor = tensors[i];
    weightd_shard& shard = shards[i];
    tensor.name = from.info.name.c_str();
    tensor.dtype = static_cast<weightd_dtype>(from.info.dtype);
    tensor.num_dims = shape.size();
    tensor.num_shards = 1;
    tensor.shards = &shard;
    std::copy(shape.begin(), shape.end(), tensor.shape);
    std::copy(shape.begin(), shape.end(), shard.extent);
    std::copy(strides.begin(), strides.end(), shard.memory.strides);
    shard.memory.fd = -1;
    shard.memory.address = from.address;
  }
  return actor->Register(tensors);
}

SyncOutcome Sync(const Checkpoint& checkpoint, uint64_t version, PushProgress::Style style,
                 ActorClient* actor) {
  weightd_sync_options options{};
  options.version = version;
  if (Status begun = actor->SyncBegin(options); !begun.ok()) return {std::move(begun), ""};
  PushProgress progress(style);
  bool cancelled = false;
  for (int turn = 1;; ++turn) {
    if (auto outcome = actor->SyncWait(kReleaseMs)) return *std::move(outcome);
    checkpoint.ReleasePages();
    if (turn % kLook != 0) continue;
    if (interrupted != 0 && !cancelled) {
      cancelled = true;
      actor->Cancel();
    }
    const Json state = Json::parse(actor->StateJson(), nullptr, false);
    progress.Show(state.value("phase", ""), state.value("bytes_done", uint64_t{0}),
                  state.value("bytes_total", uint64_t{0}));
  }
}

StatusOr<std::unique_ptr<ActorClient>> OpenActor(const GlobalOptions& global,
                                                 const std::string& model) {
  SessionSettings settings;
  const bool path = global.address.starts_with('/');
  WEIGHTD_ASSIGN_OR_RETURN(settings.address,
                           ParseAddress(path ? "unix:" + global.address : global.address));
  settings.connect_timeout = global.timeout;
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const uint64_t micros =
      static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(now).count());
  auto actor = std::make_unique<ActorClient>(
      std::move(settings),
      ActorClient::Identity{.model = model,
                            .group = fmt::format("weightctl-push-{}-{}", ::getpid(), micros),
                            .group_order = micros});
  if (Status opened = actor->Open(); !opened.ok()) {
    actor->Close();
    return opened;
  }
  return actor;
}

/// What is reported about a push that the daemon has answered.
struct Pushed {
  const PushOptions& options;
  const Checkpoint& checkpoint;
  PushTarget target;
  Json result;
  double seconds = 0;
};

std::string ReplicaTable(const Json& result, const TextStyle& style) {
  Table table({{"ENGINE"}, {"DP", true}, {"STATE", false, true}, {"VERSION", true}});
  if (!result.contains("replicas")) return "";
  for (const Json& replica : result["replicas"]) {
    table.AddRow({replica.value("engine", ""), std::to_string(replica.value("dp_rank", 0)),
                  replica.value("state", ""),
                  std::to_string(replica.value("version", uint64_t{0}))});
  }
  return table.empty() ? "" : table.Render(style, 2);
}

ExitCode Report(const Pushed& pushed, const GlobalOptions& global) {
  const Checkpoint& checkpoint = pushed.checkpoint;
  const uint64_t landed = pushed.result.value("bytes", uint64_t{0});
  std::string text;
  if (global.format == Format::kJson) {
    const Json json = {{"model", pushed.target.model},
                       {"version", pushed.target.version},
                       {"directory", pushed.options.directory},
                       {"files", checkpoint.files().size()},
                       {"tensors", checkpoint.tensors().size()},
                       {"checkpoint_bytes", checkpoint.size_bytes()},
                       {"seconds", pushed.seconds},
                       {"result", pushed.result}};
    text = json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
  } else {
    text =
        fmt::format(
            "pushed {} to model {} as version {}: {} tensors of {} files, {} landed in {} ({})\n",
            Printable(pushed.options.directory), Printable(pushed.target.model),
            pushed.target.version, HumanCount(checkpoint.tensors().size()),
            checkpoint.files().size(), HumanBytes(landed),
            HumanTime(static_cast<uint64_t>(pushed.seconds * 1e6)),
            HumanRate(static_cast<double>(landed) / pushed.seconds)) +
        ReplicaTable(pushed.result, global.Style());
  }
  return Print(text) ? ExitCode::kOk : ExitCode::kFailure;
}

// A sync that failed: the error, and what it did to each replica.
ExitCode ReportFailure(const Status& status, const Json& result, const GlobalOptions& global) {
  if (global.format != Format::kJson) {
    const ExitCode exit_code = Fail(status, ExitCode::kFailure, global.format);
    std::fputs(ReplicaTable(result, global.Style()).c_str(), stderr);
    return exit_code;
  }
  Json json = Json::parse(ErrorJson(status, ExitCode::kFailure), nullptr, false);
  json["result"] = result;
  Print(json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n");
  return ExitCode::kFailure;
}

}  // namespace

ExitCode RunPush(const GlobalOptions& global, const PushOptions& push) {
  CatchTruncation(push.directory, global.format);
  const auto checkpoint = Checkpoint::Open(push.directory);
  if (!checkpoint.ok()) return Fail(checkpoint.status(), global.format);
  AdminClient admin(global.address, global.timeout);
  const auto status = admin.GetStatus({});
  if (!status.ok()) return Fail(status.status(), global.format);
  const auto target = ChooseTarget(*status, checkpoint->architectures(), push);
  if (!target.ok()) {
    const bool usage = target.status().code() == StatusCode::kInvalidArgument;
    return Fail(target.status(), usage ? ExitCode::kUsage : ExitCode::kFailure, global.format);
  }
  CatchInterrupts();
  const auto start = std::chrono::steady_clock::now();
  const auto actor = OpenActor(global, target->model);
  if (!actor.ok()) return Fail(actor.status(), global.format);
  Status registered = Register(*checkpoint, actor->get());
  SyncOutcome outcome{registered, ""};
  if (registered.ok()) {
    outcome = Sync(*checkpoint, target->version,
                   PushProgress::ChooseStyle(global.format == Format::kJson), actor->get());
  }
  (*actor)->Close();
  Json result = Json::parse(outcome.result_json, nullptr, false);
  if (!result.is_object()) result = Json::object();
  if (outcome.status.ok()) outcome.status = checkpoint->CheckUnchanged();
  if (!outcome.status.ok()) return ReportFailure(outcome.status, result, global);
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return Report({push, *checkpoint, *target, std::move(result), seconds}, global);
}

}  // namespace weightd::ctl
