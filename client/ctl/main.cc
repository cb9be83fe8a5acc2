// weightctl: what operators ask a weightd. Declares options and commands; the work is in
// commands.cc.
#include <CLI/CLI.hpp>
#include <functional>
#include <map>

#include "client/ctl/commands.h"
#include "client/ctl/layout_commands.h"
#include "client/ctl/push.h"

namespace weightd::ctl {
namespace {

/// Everything that the command line fills.
struct CommandLine {
  GlobalOptions global;
  WatchOptions watch;
  PlanOptions plan;
  PushOptions push;
  std::string model;
  std::string engine;
  std::string case_file;
  std::string rule_path;
  std::string trace_file;
  std::string loaders_dir;
  std::string color = "auto";
  double timeout_s = 5;
  double interval_s = 0.5;
  std::function<ExitCode(const CommandLine&)> run;
};

using Run = ExitCode (*)(const CommandLine&);

CLI::App* AddCommand(CLI::App* parent, CommandLine* line, const char* name, const char* help,
                     Run run) {
  CLI::App* command = parent->add_subcommand(name, help);
  command->callback([line, run] { line->run = run; });
  return command;
}

void AddGlobals(CLI::App* app, CommandLine* line) {
  static const std::map<std::string, Format> kFormats = {
      {"table", Format::kTable}, {"wide", Format::kWide}, {"json", Format::kJson}};
  static const std::map<std::string, double> kSeconds = {{"ms", 1e-3}, {"s", 1}, {"m", 60}};
  app->add_option("-a,--address", line->global.address,
                  "weightd's address: unix:/path, /path or host:port")
      ->envname("WEIGHTD_ADDRESS")
      ->capture_default_str();
  app->add_option("-o,--output", line->global.format, "table, wide or json")
      ->transform(CLI::Transformer(kFormats).description(""))
      ->option_text("FORMAT");
  app->add_option("--timeout", line->timeout_s, "longest wait for an answer, e.g. 5s or 500ms")
      ->transform(CLI::AsNumberWithUnit(kSeconds, CLI::AsNumberWithUnit::CASE_SENSITIVE, "TIME"))
      ->check(CLI::PositiveNumber)
      ->option_text("TIME [5s]");
  app->add_option("--color", line->color, "auto, always or never; auto honours NO_COLOR")
      ->check(CLI::IsMember({"auto", "always", "never"}).description(""))
      ->option_text("WHEN [auto]");
}

void AddModel(CLI::App* command, std::string* model) {
  command->add_option("--model", *model, "only this model");
}

void AddLoadersDir(CLI::App* command, CommandLine* line) {
  command->add_option("--loaders-dir", line->loaders_dir, "rule files beside the embedded ones");
}

void AddStatusCommands(CLI::App* app, CommandLine* line) {
  CLI::App* status =
      AddCommand(app, line, "status", "daemon, workers, models and the running sync",
                 [](const CommandLine& l) { return RunStatus(l.global, l.model, l.watch); });
  AddModel(status, &line->model);
  status->add_flag("-w,--watch", line->watch.watch, "repeat until interrupted");
  status->add_option("--interval", line->interval_s, "seconds between two looks of --watch")
      ->check(CLI::Range(0.05, 3600.0).description(""))
      ->capture_default_str();
  CLI::App* health =
      AddCommand(app, line, "health", "for probes: exits 0 when healthy, 3 when not",
                 [](const CommandLine& l) { return RunHealth(l.global, l.model, l.engine); });
  AddModel(health, &line->model);
  health->add_option("--engine", line->engine, "every replica of this engine must be ready");
  AddModel(AddCommand(app, line, "engines", "every replica with state and version",
                      [](const CommandLine& l) { return RunEngines(l.global, l.model); }),
           &line->model);
  AddModel(AddCommand(app, line, "versions", "versions held, and past syncs",
                      [](const CommandLine& l) { return RunVersions(l.global, l.model); }),
           &line->model);
  AddCommand(app, line, "version", "the version of weightctl",
             [](const CommandLine& l) { return RunVersion(l.global); });
}

void AddPlanCommands(CLI::App* app, CommandLine* line) {
  CLI::App* plan = app->add_subcommand("plan", "what moves where");
  plan->require_subcommand(1);
  CLI::App* show = AddCommand(plan, line, "show", "the plan between trainer and engines of a model",
                              [](const CommandLine& l) { return RunPlanShow(l.global, l.plan); });
  AddModel(show, &line->plan.model);
  show->add_option("--tensor", line->plan.tensor,
                   "only tensors whose name contains this, with every box");
  show->add_option("--limit", line->plan.limit, "list at most this many tensors [200]");
  CLI::App* exported = AddCommand(
      plan, line, "export", "a golden case as weightd fills it, without a daemon",
      [](const CommandLine& l) { return RunPlanExport(l.global, l.case_file, l.loaders_dir); });
  exported->add_option("--case", line->case_file, "golden-layout file, JSON or gzip of it")
      ->required();
  AddLoadersDir(exported, line);
}

void AddLoaderCommands(CLI::App* app, CommandLine* line) {
  CLI::App* loader = app->add_subcommand("loader", "rule files of model families");
  loader->require_subcommand(1);
  AddLoadersDir(
      AddCommand(loader, line, "list", "the model families that this build knows",
                 [](const CommandLine& l) { return RunLoaderList(l.global, l.loaders_dir); }),
      line);
  CLI::App* check = AddCommand(
      loader, line, "check", "whether rule files are well-formed, or say what tracing found",
      [](const CommandLine& l) { return RunLoaderCheck(l.global, l.rule_path, l.trace_file); });
  check->add_option("PATH", line->rule_path, "a rule file, or a directory of *.rules files")
      ->required();
  check->add_option("--trace", line->trace_file,
                    "compare with this trace of the engine's own loader, element by element");
}

void AddPushCommand(CLI::App* app, CommandLine* line) {
  CLI::App* push = AddCommand(app, line, "push", "a Hugging Face checkpoint directory into engines",
                              [](const CommandLine& l) { return RunPush(l.global, l.push); });
  push->add_option("DIR", line->push.directory, "directory with config.json and safetensors files")
      ->required();
  push->add_option("--model", line->push.model, "the model's key; needed if there are several");
  push->add_option("--version", line->push.version, "version to publish [highest known + 1]")
      ->check(CLI::PositiveNumber.description(""));
  push->add_flag("--take-over", line->push.take_over,
                 "push although a trainer is registered; fences the trainer");
}

// True if the command line asks for JSON, also when it cannot be parsed.
bool WantsJson(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string_view word = argv[i];
    if (word == "-ojson" || word == "-o=json" || word == "--output=json") return true;
    const bool option = word == "-o" || word == "--output";
    if (option && i + 1 < argc && std::string_view(argv[i + 1]) == "json") return true;
  }
  return false;
}

ExitCode UsageError(const CLI::ParseError& error, bool json) {
  const Status status = Error(StatusCode::kInvalidArgument, reason::kConfig, "see weightctl --help",
                              "{}", error.what());
  return Fail(status, ExitCode::kUsage, json ? Format::kJson : Format::kTable);
}

int Main(int argc, char** argv) {
  CommandLine line;
  CLI::App app("weightctl asks a weightd how its weight syncs are.", "weightctl");
  app.footer(kExitCodeHelp);
  app.require_subcommand(1);
  app.fallthrough();
  AddGlobals(&app, &line);
  AddStatusCommands(&app, &line);
  AddPushCommand(&app, &line);
  AddPlanCommands(&app, &line);
  AddLoaderCommands(&app, &line);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    return static_cast<int>(UsageError(error, WantsJson(argc, argv)));
  }
  line.global.timeout = std::chrono::milliseconds(static_cast<int64_t>(line.timeout_s * 1e3));
  line.watch.interval = std::chrono::milliseconds(static_cast<int64_t>(line.interval_s * 1e3));
  line.global.color = UseColor(line.color);
  return static_cast<int>(line.run(line));
}

}  // namespace
}  // namespace weightd::ctl

// NOLINTNEXTLINE(bugprone-exception-escape): out of memory may end weightctl
int main(int argc, char** argv) { return weightd::ctl::Main(argc, argv); }
