#include <fmt/format.h>

#include <set>

#include "client/ctl/quantity.h"
#include "client/ctl/render.h"

namespace weightd::ctl {
namespace {

template <typename Values>
std::string Dimensions(const Values& values) {
  return fmt::format("[{}]", fmt::join(values, ", "));
}

// "[0:4, 128:256]", half-open.
std::string BoxText(const v1::Box& box) {
  std::string text;
  for (int i = 0; i < std::min(box.origin_size(), box.extent_size()); ++i) {
    text += fmt::format("{}{}:{}", text.empty() ? "" : ", ", box.origin(i),
                        box.origin(i) + box.extent(i));
  }
  return "[" + text + "]";
}

std::string Hex(const std::string& bytes) {
  std::string text;
  for (const char c : bytes) text += fmt::format("{:02x}", static_cast<unsigned char>(c));
  return text;
}

std::string RenderPairs(const v1::GetPlanResponse& plan, const TextStyle& style) {
  Table table({{"FROM"}, {"TO"}, {"PATH"}, {"BOXES", true}, {"BYTES", true}, {"REASON"}});
  for (const auto& pair : plan.pairs()) {
    std::string reason = pair.reason();
    if (pair.source_device() != pair.target_device()) {
      reason += fmt::format(" ({} to {})", pair.source_device(), pair.target_device());
    }
    table.AddRow({pair.source(), pair.target(), pair.path(), HumanCount(pair.boxes()),
                  HumanBytes(pair.bytes()), Printable(reason)});
  }
  return table.empty() ? "" : "\n" + table.Render(style);
}

std::string RenderTensors(const v1::GetPlanResponse& plan, const TextStyle& style) {
  Table table({{"TENSOR"}, {"SHAPE"}, {"BOXES", true}, {"BYTES", true}, {"PARAMETERS"}});
  for (const auto& tensor : plan.tensors()) {
    uint64_t bytes = 0;
    std::set<std::string> params;
    for (const auto& box : tensor.boxes()) {
      bytes += box.bytes();
      params.insert(box.param());
    }
    table.AddRow({tensor.tensor(), Dimensions(tensor.shape()), std::to_string(tensor.boxes_size()),
                  HumanBytes(bytes), fmt::format("{}", fmt::join(params, ", "))});
  }
  return table.empty() ? "" : "\n" + table.Render(style);
}

std::string RenderBoxes(const v1::GetPlanResponse& plan, const TextStyle& style) {
  std::string text;
  for (const auto& tensor : plan.tensors()) {
    text += fmt::format("\ntensor {} {}\n", Printable(tensor.tensor()), Dimensions(tensor.shape()));
    Table table({{"FROM"}, {"SOURCE BOX"}, {"TO"}, {"PARAMETER"}, {"TARGET BOX"}, {"BYTES", true}});
    for (const auto& box : tensor.boxes()) {
      table.AddRow({box.source(), BoxText(box.source_box()), box.target(), box.param(),
                    BoxText(box.target_box()), HumanBytes(box.bytes())});
    }
    text += table.empty() ? "  skipped by a rule\n" : table.Render(style, 2);
  }
  return text;
}

}  // namespace

std::string RenderPlan(const v1::GetPlanResponse& plan, bool with_boxes, const TextStyle& style) {
  std::string text = fmt::format(
      "plan of model {}, digest {}, {}\n", Printable(plan.model()), Hex(plan.digest()),
      plan.cached() ? "from the cache (compiled in " + HumanTime(plan.compile_us()) + ")"
                    : "compiled in " + HumanTime(plan.compile_us()));
  text += fmt::format("{} tensors, {} boxes, {} landed in {} windows, predicted {}",
                      HumanCount(plan.total_tensors()), HumanCount(plan.total_boxes()),
                      HumanBytes(plan.total_bytes()), HumanCount(plan.windows()),
                      HumanTime(static_cast<uint64_t>(plan.predicted_seconds() * 1e6)));
  if (!plan.prediction_basis().empty()) text += " (" + Printable(plan.prediction_basis()) + ")";
  if (plan.staging_bytes() > 0) {
    text += fmt::format("\nstaging of what is sent: at most {} of each device, beside NCCL's own",
                        HumanBytes(plan.staging_bytes()));
  }
  if (plan.stage_bytes() > 0) {
    text += fmt::format("\nstages of an engine rank: at most {} of its device",
                        HumanBytes(plan.stage_bytes()));
  }
  text += "\n" + RenderPairs(plan, style);
  text += with_boxes || style.wide ? RenderBoxes(plan, style) : RenderTensors(plan, style);
  const auto listed = static_cast<uint32_t>(plan.tensors_size());
  if (listed < plan.total_tensors()) {
    text += fmt::format("\n{} of {} tensors listed: choose with --tensor, raise --limit\n", listed,
                        plan.total_tensors());
  }
  return text;
}

}  // namespace weightd::ctl
