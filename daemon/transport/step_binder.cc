#include "daemon/transport/step_binder.h"

#include <algorithm>
#include <thread>
#include <utility>

namespace weightd {
namespace {

/// Between two looks at what has landed: little beside a window.
constexpr microseconds kLandedNap{50};

}  // namespace

std::vector<uint32_t> WritesLanded(const RankPlan& plan) {
  std::vector<uint32_t> landed(plan.windows.size());
  uint32_t first_left = kAllLanded;
  for (size_t w = plan.windows.size(); w-- > 0;) {
    landed[w] = first_left;
    for (uint32_t i = plan.windows[w].begin; i < plan.windows[w].end; ++i) {
      first_left = std::min(first_left, plan.copies[i].write);
    }
  }
  return landed;
}

std::vector<uint32_t> TensorsOf(const RankLayout& layout) {
  std::vector<uint32_t> tensors;
  for (const Write& write : layout.writes) {
    if (!write.zero_fill) tensors.push_back(write.tensor);
  }
  std::sort(tensors.begin(), tensors.end());
  tensors.erase(std::unique(tensors.begin(), tensors.end()), tensors.end());
  return tensors;
}

void StepBinder::SetTarget(size_t target) {
  target_ = &plan_.targets[target];
  tensors_ = TensorsOf(*target_->layout);
}

Status Transport::CopyParams(const BoundPlan&, size_t, std::span<const Binding>, RunControl&) {
  return Error(StatusCode::kUnimplemented, reason::kInternal, "report this with the log",
               "transport {} leaves catch-up to the host", name());
}

StatusOr<std::vector<RankDigests>> Transport::TransferAll(const BoundPlan& plan,
                                                          std::span<const uint32_t> targets,
                                                          RunControl& control) {
  std::vector<RankDigests> digests;
  uint32_t windows_before = 0;
  uint64_t bytes_before = 0;
  for (uint32_t target : targets) {
    RunControl one = control;
    one.on_window = [&](uint32_t windows, uint64_t bytes, const std::string& next) {
      if (control.on_window)
        control.on_window(windows_before + windows, bytes_before + bytes, next);
    };
    WEIGHTD_ASSIGN_OR_RETURN(RankDigests rank, Transfer(plan, target, one));
    digests.push_back(std::move(rank));
    windows_before += static_cast<uint32_t>(plan.targets[target].plan->windows.size());
    bytes_before += plan.targets[target].plan->bytes;
  }
  return digests;
}

std::string StepBinder::ParamAt(size_t write) const {
  if (target_ == nullptr) return "";  // a step on shards alone
  const RankLayout& layout = *target_->layout;
  return write < layout.writes.size() ? layout.params[layout.writes[write].param].name : "";
}

std::string StepBinder::FirstParam(size_t window) const {
  const RankPlan& plan = *target_->plan;
  if (window >= plan.windows.size()) return "";
  return ParamAt(plan.copies[plan.windows[window].begin].write);
}

void StepBinder::Report(uint32_t windows, uint64_t bytes, const std::string& next) const {
  if (control_.on_window) control_.on_window(windows, bytes, next);
}

Status StepBinder::AwaitLanded(size_t writes) const {
  if (control_.landed == nullptr) return absl::OkStatus();
  while (control_.landed->load(std::memory_order_acquire) < writes) {
    WEIGHTD_RETURN_IF_ERROR(Check(ParamAt(writes - 1)));
    std::this_thread::sleep_for(kLandedNap);
  }
  return absl::OkStatus();
}

Status StepBinder::Fail(Status status, const std::string& tensor) const {
  ErrorFields fields;
  fields.tensor = tensor;
  fields.phase = phase_;
  if (target_ != nullptr) fields.peer = target_->label;
  return WithFields(std::move(status), fields);
}

Status StepBinder::Check(const std::string& tensor) const {
  if (control_.cancelled != nullptr && control_.cancelled->load(std::memory_order_relaxed)) {
    return Fail(Error(StatusCode::kCancelled, reason::kCancelled, "sync again",
                      "step was cancelled: next={}", tensor),
                tensor);
  }
  if (Clock::now() > control_.deadline) {
    return Fail(Error(StatusCode::kDeadlineExceeded, reason::kDeadline,
                      "raise the phase's deadline or give the worker more cores",
                      "step ran out of time: next={}", tensor),
                tensor);
  }
  if (control_.check_memory) {
    if (Status intact = control_.check_memory(); !intact.ok()) return Fail(intact, tensor);
  }
  return absl::OkStatus();
}

Status StepBinder::NoMemory(const std::string& tensor, uint32_t rank) const {
  return Fail(Error(StatusCode::kFailedPrecondition, reason::kMemoryMoved,
                    "register the trainer's tensors again",
                    "shard has no memory: tensor={}, rank={}", tensor, rank),
              tensor);
}

StatusOr<BlockItem> StepBinder::Bind(const Write& write, const Box& source,
                                     const Box& target) const {
  const ParamInfo& param = target_->layout->params[write.param];
  const Binding& binding = target_->params[write.param];
  if (binding.base == nullptr) {
    return Fail(Error(StatusCode::kFailedPrecondition, reason::kMemoryMoved,
                      "register the engine's parameters again", "parameter has no memory: param={}",
                      param.name),
                param.name);
  }
  BlockItem item;
  item.zero_fill = write.zero_fill;
  item.param = write.param;
  const int source_dims = write.zero_fill ? 0 : source.num_dims();
  item.to = BindTarget(binding, write, target, source_dims, param.dtype);
  if (write.zero_fill) {
    item.word = tensors_.size();
    return item;
  }
  item.position = {write.tensor, (*plan_.table)[write.tensor].shape, source.origin};
  item.word = static_cast<size_t>(std::lower_bound(tensors_.begin(), tensors_.end(), write.tensor) -
                                  tensors_.begin());
  return item;
}

StatusOr<BlockItem> StepBinder::BindWrite(size_t write) const {
  const Write& whole = target_->layout->writes[write];
  return Bind(whole, whole.source, whole.target);
}

StatusOr<BlockItem> StepBinder::BindCopy(const Copy& copy) const {
  const Write& write = target_->layout->writes[copy.write];
  WEIGHTD_ASSIGN_OR_RETURN(BlockItem item, Bind(write, copy.source, copy.target));
  if (write.zero_fill) return item;
  const Binding& binding = Source(copy.source_rank, write.tensor, copy.shard);
  if (binding.staged) return item;
  const TensorInfo& tensor = (*plan_.table)[write.tensor];
  if (binding.base == nullptr) return NoMemory(tensor.name, copy.source_rank);
  item.from = BindSource(binding, Held(copy.source_rank, write.tensor, copy.shard), copy.source,
                         tensor.dtype);
  return item;
}

}  // namespace weightd
