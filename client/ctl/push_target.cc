#include "client/ctl/push_target.h"

#include <algorithm>

namespace weightd::ctl {
namespace {

std::string ModelNames(const v1::GetStatusResponse& status) {
  std::string names;
  for (const auto& model : status.models()) names += (names.empty() ? "" : ", ") + model.model();
  return names.empty() ? "none" : names;
}

StatusOr<const v1::ModelStatus*> FindModel(const v1::GetStatusResponse& status,
                                           const std::string& name) {
  for (const auto& model : status.models()) {
    if (name == model.model() || (name.empty() && status.models_size() == 1)) return &model;
  }
  if (name.empty() && status.models_size() > 1) {
    return Error(StatusCode::kInvalidArgument, reason::kConfig, "choose one with --model",
                 "there are several models: {}", ModelNames(status));
  }
  return Error(StatusCode::kNotFound, reason::kNoEngine,
               "start an inference engine with this model name, then push",
               "no such model is registered: {}; known: {}", name.empty() ? "-" : name,
               ModelNames(status));
}

Status CheckEngines(const v1::ModelStatus& model, const std::vector<std::string>& architectures,
                    const std::string& directory) {
  bool alive = false;
  for (const auto& engine : model.engines()) {
    if (engine.state() == v1::ENGINE_STATE_GONE) continue;
    alive = true;
    // Empty until the first rank has registered.
    const std::string& runs = engine.architecture();
    const bool known = !runs.empty();
    if (!known ||
        std::find(architectures.begin(), architectures.end(), runs) != architectures.end()) {
      continue;
    }
    return WithPeer(
        Error(StatusCode::kFailedPrecondition, reason::kConfig,
              "push a checkpoint of the engine's model, or start the engine from this checkpoint",
              "checkpoint and engine are of different architectures: {}/config.json names {}, "
              "engine {} runs {}",
              directory, fmt::join(architectures, ", "), engine.engine(), runs),
        fmt::format("engine {} dp {}", engine.engine(), engine.dp_rank()));
  }
  if (alive) return absl::OkStatus();
  return Error(StatusCode::kNotFound, reason::kNoEngine,
               "start an inference engine with this model name, then push",
               "no engine is registered for model {}", model.model());
}

}  // namespace

StatusOr<PushTarget> ChooseTarget(const v1::GetStatusResponse& status,
                                  const std::vector<std::string>& architectures,
                                  const PushOptions& options) {
  WEIGHTD_ASSIGN_OR_RETURN(const v1::ModelStatus* model, FindModel(status, options.model));
  WEIGHTD_RETURN_IF_ERROR(CheckEngines(*model, architectures, options.directory));
  if (model->has_actors() && !options.take_over) {
    return Error(StatusCode::kFailedPrecondition, reason::kFenced,
                 "let the trainer sync, or stop it first; --take-over pushes all the same and "
                 "fences the trainer",
                 "a trainer is registered for this model: model={} group={} ranks={}/{}",
                 model->model(), model->actors().group(), model->actors().registered(),
                 model->actors().world_size());
  }
  uint64_t highest = model->highest_version();
  for (const auto& engine : model->engines()) highest = std::max(highest, engine.version());
  return PushTarget{model->model(), options.version > 0 ? options.version : highest + 1};
}

}  // namespace weightd::ctl
