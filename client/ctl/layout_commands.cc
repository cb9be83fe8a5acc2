#include "client/ctl/layout_commands.h"

#include "client/ctl/pure/case_export.h"
#include "client/ctl/pure/loader_commands.h"
#include "client/ctl/pure/trace_check.h"

namespace weightd::ctl {
namespace {

ExitCode PrintOr(const std::string& text) {
  return Print(text) ? ExitCode::kOk : ExitCode::kFailure;
}

}  // namespace

ExitCode RunPlanExport(const GlobalOptions& global, const std::string& file,
                       const std::string& loaders_dir) {
  const auto registry = LoaderRegistry::Create(loaders_dir);
  if (!registry.ok()) return Fail(registry.status(), global.format);
  const auto text = ExportCase(file, **registry);
  if (!text.ok()) return Fail(text.status(), global.format);
  return PrintOr(text->ends_with('\n') ? *text : *text + "\n");
}

ExitCode RunLoaderList(const GlobalOptions& global, const std::string& loaders_dir) {
  const auto registry = LoaderRegistry::Create(loaders_dir);
  if (!registry.ok()) return Fail(registry.status(), global.format);
  return PrintOr(ListLoaders(**registry, global.format == Format::kJson));
}

ExitCode RunLoaderCheck(const GlobalOptions& global, const std::string& path,
                        const std::string& trace) {
  const bool json = global.format == Format::kJson;
  const auto check = trace.empty() ? CheckLoaders(path, json) : CheckTrace(path, trace, json);
  if (!check.ok()) return Fail(check.status(), global.format);
  if (!Print(check->output)) return ExitCode::kFailure;
  return check->passed ? ExitCode::kOk : ExitCode::kFailure;
}

}  // namespace weightd::ctl
