#include "client/ctl/commands.h"

#include <fmt/format.h>
#include <unistd.h>

#include <nlohmann/json.hpp>
#include <thread>

#include "client/ctl/admin_client.h"
#include "client/ctl/health.h"
#include "client/ctl/render.h"
#include "daemon/base/version.h"

namespace weightd::ctl {
namespace {

using Json = nlohmann::ordered_json;
using Render = std::string (*)(const v1::GetStatusResponse&, const TextStyle&);

StatusOr<v1::GetStatusResponse> AskStatus(AdminClient* client, const std::string& model) {
  v1::GetStatusRequest request;
  request.set_model(model);
  return client->GetStatus(request);
}

ExitCode PrintOr(const std::string& text) {
  return Print(text) ? ExitCode::kOk : ExitCode::kFailure;
}

std::string DumpJson(const Json& json) {
  return json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

ExitCode ShowStatus(const GlobalOptions& global, const std::string& model, Render render) {
  AdminClient client(global.address, global.timeout);
  const auto status = AskStatus(&client, model);
  if (!status.ok()) return Fail(status.status(), global.format);
  return PrintOr(global.format == Format::kJson ? ToJson(*status, false)
                                                : render(*status, global.Style()));
}

// Draws over the previous picture without clearing first, which would flicker.
std::string Redrawn(const std::string& text) {
  std::string result = "\033[H";
  for (const char c : text) {
    if (c == '\n') result += "\033[K";
    result += c;
  }
  return result + "\033[J";
}

// The model to show a plan of; sets `exit_code` beside an error.
StatusOr<std::string> OnlyModel(AdminClient* client, ExitCode* exit_code) {
  WEIGHTD_ASSIGN_OR_RETURN(const auto status, AskStatus(client, ""));
  if (status.models_size() == 1) return status.models(0).model();
  if (status.models().empty()) {
    return Error(StatusCode::kNotFound, reason::kNoPlan, "start a trainer and an engine first",
                 "there is no plan: no model has registered");
  }
  std::string names;
  for (const auto& model : status.models()) names += (names.empty() ? "" : ", ") + model.model();
  *exit_code = ExitCode::kUsage;
  return Error(StatusCode::kInvalidArgument, reason::kConfig, "choose one with --model",
               "there are several models: {}", names);
}

}  // namespace

ExitCode RunStatus(const GlobalOptions& global, const std::string& model,
                   const WatchOptions& watch) {
  if (!watch.watch) return ShowStatus(global, model, RenderStatus);
  AdminClient client(global.address, global.timeout);
  const bool json = global.format == Format::kJson;
  const bool redraw = !json && isatty(STDOUT_FILENO) == 1;
  while (true) {
    const auto status = AskStatus(&client, model);
    if (!status.ok()) return Fail(status.status(), global.format);
    const std::string text = json ? ToJson(*status, true) : RenderStatus(*status, global.Style());
    if (!Print(redraw ? Redrawn(text) : text + (json ? "" : "\n"))) return ExitCode::kFailure;
    std::this_thread::sleep_for(watch.interval);
  }
}

ExitCode RunEngines(const GlobalOptions& global, const std::string& model) {
  return ShowStatus(global, model, RenderEngines);
}

ExitCode RunVersions(const GlobalOptions& global, const std::string& model) {
  return ShowStatus(global, model, RenderVersions);
}

ExitCode RunHealth(const GlobalOptions& global, const std::string& model,
                   const std::string& engine) {
  AdminClient client(global.address, global.timeout);
  const auto status = AskStatus(&client, model);
  if (!status.ok()) return Fail(status.status(), global.format);
  const Health health = engine.empty() ? JudgeDaemon(*status) : JudgeEngine(*status, engine);
  std::string text =
      fmt::format("{}: {}\n", PaintState(health.healthy ? "healthy" : "unhealthy", global.Style()),
                  Printable(health.detail));
  if (global.format == Format::kJson) {
    text = DumpJson({{"healthy", health.healthy}, {"engine", engine}, {"detail", health.detail}});
  }
  if (!Print(text)) return ExitCode::kFailure;
  return health.healthy ? ExitCode::kOk : ExitCode::kUnhealthy;
}

ExitCode RunPlanShow(const GlobalOptions& global, const PlanOptions& plan) {
  AdminClient client(global.address, global.timeout);
  v1::GetPlanRequest request;
  request.set_model(plan.model);
  request.set_tensor(plan.tensor);
  request.set_limit(plan.limit);
  if (plan.model.empty()) {
    ExitCode exit_code = ExitCode::kOk;
    const auto model = OnlyModel(&client, &exit_code);
    if (!model.ok()) {
      if (exit_code == ExitCode::kOk) exit_code = ExitCodeOf(model.status());
      return Fail(model.status(), exit_code, global.format);
    }
    request.set_model(*model);
  }
  const auto response = client.GetPlan(request);
  if (!response.ok()) return Fail(response.status(), global.format);
  return PrintOr(global.format == Format::kJson
                     ? ToJson(*response, false)
                     : RenderPlan(*response, !plan.tensor.empty(), global.Style()));
}

ExitCode RunVersion(const GlobalOptions& global) {
  if (global.format == Format::kJson) {
    return PrintOr(
        DumpJson({{"weightctl", kVersion},
                  {"protocol", {{"major", kProtocolMajor}, {"minor", kProtocolMinor}}}}));
  }
  return PrintOr(
      fmt::format("weightctl {} (protocol {}.{})\n", kVersion, kProtocolMajor, kProtocolMinor));
}

}  // namespace weightd::ctl
