#include <fmt/format.h>

#include <algorithm>

#include "client/ctl/quantity.h"
#include "client/ctl/render.h"
#include "daemon/wire/convert.h"

namespace weightd::ctl {
namespace {

std::string Attempt(const v1::AttemptId& attempt) {
  return fmt::format("{}.{}", attempt.epoch(), attempt.counter());
}

std::string Version(uint64_t version) { return version == 0 ? "-" : std::to_string(version); }

uint64_t TotalTime(const google::protobuf::RepeatedPtrField<v1::PhaseTime>& phases) {
  uint64_t total = 0;
  for (const auto& phase : phases) total += phase.duration_us();
  return total;
}

std::string PhaseTimes(const google::protobuf::RepeatedPtrField<v1::PhaseTime>& phases) {
  std::string text;
  for (const auto& phase : phases) {
    text += fmt::format("{}{} {}", text.empty() ? "" : ", ", PhaseName(phase.phase()),
                        HumanTime(phase.duration_us()));
  }
  return text;
}

int Committed(const v1::SyncResult& result) {
  return static_cast<int>(std::count_if(result.replicas().begin(), result.replicas().end(),
                                        [](const auto& replica) { return replica.committed(); }));
}

bool Failed(const v1::SyncResult& result) {
  return result.has_error() && result.error().code() != 0;
}

std::string RenderWorkers(const v1::GetStatusResponse& status, const TextStyle& style) {
  const auto& workers = status.workers();
  const bool with_owner = std::any_of(workers.begin(), workers.end(),
                                      [](const auto& worker) { return !worker.owner().empty(); });
  std::vector<Column> columns{{"WORKER"},        {"STATE", false, true}, {"PID", true},
                              {"MEMBERS", true}, {"MAPPED", true},       {"RESTARTS", true},
                              {"LAST EXIT"}};
  if (with_owner) columns.push_back({"STARTED BY"});
  Table table(std::move(columns));
  for (const auto& worker : workers) {
    std::vector<std::string> row{worker.device(),
                                 worker.attached() ? "attached" : "lost",
                                 worker.pid() == 0 ? "" : std::to_string(worker.pid()),
                                 std::to_string(worker.members()),
                                 HumanBytes(worker.mapped_bytes()),
                                 std::to_string(worker.restarts()),
                                 Printable(worker.last_exit())};
    if (with_owner) row.push_back(worker.owner().empty() ? "daemon" : Printable(worker.owner()));
    table.AddRow(std::move(row));
  }
  return table.empty() ? "no worker\n" : table.Render(style);
}

// The sync that runs now: what, how far, how fast, on whom it waits.
std::string RenderSync(const v1::SyncStatus& sync, const TextStyle& style) {
  const uint64_t total = sync.bytes_total();
  const double percent =
      total == 0 ? 0 : 100.0 * static_cast<double>(sync.bytes_done()) / static_cast<double>(total);
  std::string text = fmt::format(
      "  syncing version {} (attempt {}): {}, {} of {}", sync.version(), Attempt(sync.attempt()),
      PaintState(PhaseName(sync.phase()), style), HumanBytes(sync.bytes_done()), HumanBytes(total));
  if (total != 0) text += fmt::format(" ({:.0f} %)", percent);
  text += fmt::format(", {}, {} elapsed", HumanRate(sync.bytes_per_second()),
                      HumanTime(sync.elapsed_us()));
  if (!sync.waiting_for().empty()) text += ", waiting for " + Printable(sync.waiting_for());
  text += "\n";
  if (sync.phases_size() > 0) text += "    " + PhaseTimes(sync.phases()) + "\n";
  return text;
}

std::string RenderLast(const v1::SyncResult& result, const TextStyle& style) {
  std::string text = fmt::format(
      "  last sync: version {} (attempt {}) {} in {} of {} replicas, {} in {}\n", result.version(),
      Attempt(result.attempt()), PaintState(Failed(result) ? "failed" : "committed", style),
      Failed(result) ? result.replicas_size() - Committed(result) : Committed(result),
      result.replicas_size(), HumanBytes(result.bytes()), HumanTime(TotalTime(result.phases())));
  if (Failed(result)) text += "    " + RenderError(result.error(), 4);
  if (style.wide && result.phases_size() > 0) text += "    " + PhaseTimes(result.phases()) + "\n";
  return text;
}

std::string RenderActors(const v1::ModelStatus& model) {
  if (!model.has_actors() || model.actors().world_size() == 0) return "no trainer";
  const auto& actors = model.actors();
  return fmt::format("trainer {} with {} of {} ranks, {} tensors", Printable(actors.group()),
                     actors.registered(), actors.world_size(), HumanCount(actors.tensors()));
}

std::vector<Column> EngineColumns(const TextStyle& style, bool with_model) {
  std::vector<Column> columns;
  if (with_model) columns.push_back({"MODEL"});
  columns.insert(columns.end(), {{"ENGINE"},
                                 {"DP", true},
                                 {"STATE", false, true},
                                 {"READY", false, true},
                                 {"VERSION", true},
                                 {"RANKS", true}});
  if (style.wide) {
    columns.insert(columns.end(), {{"PARAMS", true},
                                   {"STAGES", true},
                                   {"STAGED", true},
                                   {"ARCHITECTURE"},
                                   {"PROFILE"},
                                   {"LOADER"}});
  }
  columns.push_back({"ERROR"});
  return columns;
}

void AddEngines(const v1::ModelStatus& model, const TextStyle& style, bool with_model,
                Table* table) {
  for (const auto& engine : model.engines()) {
    std::vector<std::string> row;
    if (with_model) row.push_back(model.model());
    row.insert(row.end(),
               {engine.engine(), std::to_string(engine.dp_rank()), StateName(engine.state()),
                engine.ready() ? "yes" : "no", Version(engine.version()),
                fmt::format("{}/{}", engine.registered(), engine.ranks())});
    if (style.wide) {
      const bool staged = engine.stages() > 0;
      row.insert(row.end(),
                 {std::to_string(engine.params()), staged ? std::to_string(engine.stages()) : "",
                  staged ? HumanBytes(engine.staged_bytes()) : "", engine.architecture(),
                  engine.profile(), engine.loader()});
    }
    row.push_back(engine.error().message());
    table->AddRow(std::move(row));
  }
}

std::string RenderModel(const v1::ModelStatus& model, const TextStyle& style) {
  std::string text = fmt::format("\nmodel {}: version {}, {}\n", Printable(model.model()),
                                 Version(model.highest_version()), RenderActors(model));
  if (model.has_sync()) text += RenderSync(model.sync(), style);
  Table table(EngineColumns(style, false));
  AddEngines(model, style, false, &table);
  text += table.empty() ? "  no engine\n" : table.Render(style, 2);
  if (model.history_size() > 0) text += RenderLast(model.history(0), style);
  return text;
}

}  // namespace

std::string RenderError(const v1::ErrorDetail& error, int indent) {
  std::string where;
  const auto add = [&](std::string_view name, const std::string& value) {
    if (value.empty()) return;
    where += fmt::format("{}{} {}", where.empty() ? "" : ", ", name, Printable(value));
  };
  add("tensor", error.tensor());
  add("rank", error.rank());
  add("phase", error.phase());
  add("peer", error.peer());
  std::string text = Printable(error.message());
  if (!error.reason().empty()) text = Printable(error.reason()) + ": " + text;
  if (!where.empty()) text += " (" + where + ")";
  text += "\n";
  if (!error.remedy().empty()) {
    text += fmt::format("{:{}}remedy: {}\n", "", indent, Printable(error.remedy()));
  }
  return text;
}

std::string RenderStatus(const v1::GetStatusResponse& status, const TextStyle& style) {
  std::string text = fmt::format(
      "weightd {} (protocol {}.{}), epoch {}, up {}{}\n\n", Printable(status.daemon_version()),
      status.protocol().major(), status.protocol().minor(), status.epoch(),
      HumanTime(status.uptime_us()), status.draining() ? ", draining" : "");
  text += RenderWorkers(status, style);
  for (const auto& model : status.models()) text += RenderModel(model, style);
  if (status.models().empty()) text += "\nno model: no trainer and no engine has registered\n";
  return text;
}

std::string RenderEngines(const v1::GetStatusResponse& status, const TextStyle& style) {
  Table table(EngineColumns(style, true));
  for (const auto& model : status.models()) AddEngines(model, style, true, &table);
  return table.empty() ? "no engine has registered\n" : table.Render(style);
}

std::string RenderVersions(const v1::GetStatusResponse& status, const TextStyle& style) {
  std::string text;
  for (const auto& model : status.models()) {
    text += fmt::format("{}model {}: highest version {}\n", text.empty() ? "" : "\n",
                        Printable(model.model()), Version(model.highest_version()));
    Table engines({{"ENGINE"}, {"DP", true}, {"VERSION", true}, {"STATE", false, true}});
    for (const auto& engine : model.engines()) {
      engines.AddRow({engine.engine(), std::to_string(engine.dp_rank()), Version(engine.version()),
                      StateName(engine.state())});
    }
    if (!engines.empty()) text += engines.Render(style, 2);
    std::vector<Column> columns = {{"SYNC OF", true}, {"ATTEMPT"},     {"RESULT", false, true},
                                   {"REPLICAS"},      {"BYTES", true}, {"TIME", true},
                                   {"PAUSE", true},   {"ERROR"}};
    if (style.wide) columns.push_back({"PHASES"});
    Table history(std::move(columns));
    for (const auto& result : model.history()) {
      std::vector<std::string> row = {
          std::to_string(result.version()),
          Attempt(result.attempt()),
          Failed(result) ? "failed" : "committed",
          fmt::format("{}/{}", Committed(result), result.replicas_size()),
          HumanBytes(result.bytes()),
          HumanTime(TotalTime(result.phases())),
          result.pause_us() == 0 ? "" : HumanTime(result.pause_us()),
          result.error().message()};
      if (style.wide) row.push_back(PhaseTimes(result.phases()));
      history.AddRow(std::move(row));
    }
    if (!history.empty()) text += "\n" + history.Render(style, 2);
  }
  return text.empty() ? "no model: no trainer and no engine has registered\n" : text;
}

}  // namespace weightd::ctl
