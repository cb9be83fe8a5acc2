#include <algorithm>
#include <numeric>

#include "daemon/base/failpoint.h"
#include "daemon/plan/tiling.h"
#include "daemon/plan/transfer_plan.h"

namespace weightd {
namespace {

constexpr char kRuleRemedy[] =
    "correct the loader's rule or the parameters that the engine rank registers";

std::string Describe(const ParamInfo& param) {
  return fmt::format("parameter={} shape={} dtype={}", param.name, ToString(param.shape),
                     Name(param.dtype));
}

Status Refuse(const char* reason, const ParamInfo& param, const std::string& message,
              std::string_view remedy = kRuleRemedy) {
  return MakeError(StatusCode::kInvalidArgument, message,
                   {.reason = reason, .tensor = param.name, .remedy = std::string(remedy)});
}

/// True if source_dim maps the source block onto the target block element by element.
bool BlocksAgree(const Write& write) {
  unsigned followed = 0;
  for (int j = 0; j < write.target.num_dims(); ++j) {
    const int dim = write.source_dim[static_cast<size_t>(j)];
    if (dim < -1 || dim >= write.source.num_dims()) return false;
    if (dim >= 0 && (followed >> dim & 1u) != 0) return false;
    if (dim >= 0) followed |= 1u << dim;
    if (write.target.extent[j] != (dim < 0 ? 1 : write.source.extent[dim])) return false;
  }
  for (int i = 0; i < write.source.num_dims(); ++i) {
    if ((followed >> i & 1u) == 0 && write.source.extent[i] != 1) return false;
  }
  return true;
}

Status CheckWrite(const TensorTable& table, const ParamInfo& param, const Write& write) {
  if (!FitsShape(write.target, param.shape)) {
    return Refuse(reason::kShape, param,
                  fmt::format("write leaves its parameter: {} target={}", Describe(param),
                              ToString(write.target)));
  }
  if (write.zero_fill) return absl::OkStatus();
  if (write.tensor >= table.size()) {
    return Refuse(reason::kUnknownTensor, param,
                  fmt::format("write reads a tensor that does not exist: {} position={} tensors={}",
                              Describe(param), write.tensor, table.size()));
  }
  const TensorInfo& tensor = table[write.tensor];
  if (!FitsShape(write.source, tensor.shape)) {
    return Refuse(
        reason::kShape, param,
        fmt::format("write leaves its source tensor: {} tensor={} shape={} source={}",
                    Describe(param), tensor.name, ToString(tensor.shape), ToString(write.source)));
  }
  if (!BlocksAgree(write)) {
    return Refuse(
        reason::kShape, param,
        fmt::format("source and target block disagree: {} tensor={} source={} target={}",
                    Describe(param), tensor.name, ToString(write.source), ToString(write.target)));
  }
  if (!CanCast(tensor.dtype, param.dtype)) {
    return Refuse(reason::kDtype, param,
                  fmt::format("source cannot be cast to the parameter's dtype: {} tensor={} "
                              "source dtype={}",
                              Describe(param), tensor.name, Name(tensor.dtype)),
                  "register both sides in the same dtype, or both in float32, float16 or bfloat16");
  }
  return absl::OkStatus();
}

/// Proves that the target boxes of one parameter tile it.
Status CheckTiles(const ParamInfo& param, std::span<const Box> targets) {
  if (const auto overlap = FindOverlap(targets)) {
    return Refuse(
        reason::kOverlap, param,
        fmt::format("elements of a parameter are written twice: {} a={} b={}", Describe(param),
                    ToString(targets[overlap->first]), ToString(targets[overlap->second])));
  }
  int64_t written = 0;
  for (const Box& target : targets) written += target.num_elements();
  if (written == NumElements(param.shape)) return absl::OkStatus();
  const std::optional<Box> gap = FindGap(param.shape, targets);
  return Refuse(reason::kUncoveredParameter, param,
                fmt::format("elements of a parameter are not written: {} box={} written={} of={}",
                            Describe(param), gap ? ToString(*gap) : "none", written,
                            NumElements(param.shape)),
                "add a rule for this parameter to the loader, or register it as opaque");
}

/// Proves one parameter, given the targets of all its writes.
Status CheckParam(const ParamInfo& param, std::span<const Box> targets) {
  if (!param.alias_of.empty() || param.kind == ParamKind::kOpaque) {
    if (targets.empty()) return absl::OkStatus();
    return Refuse(reason::kOverlap, param,
                  fmt::format("parameter is written although {}: {} target={}",
                              param.alias_of.empty() ? "it is opaque"
                                                     : "it shares the storage of " + param.alias_of,
                              Describe(param), ToString(targets.front())));
  }
  if (targets.size() == 1 && targets.front() == WholeBox(param.shape)) return absl::OkStatus();
  return CheckTiles(param, targets);
}

}  // namespace

Status CheckCoverage(const TensorTable& table, const RankLayout& layout) {
  if (Mutated("lax_proof")) return absl::OkStatus();
  std::vector<uint32_t> first(layout.params.size() + 1, 0);
  for (size_t i = 0; i < layout.writes.size(); ++i) {
    const Write& write = layout.writes[i];
    if (write.param >= layout.params.size()) {
      return Error(StatusCode::kInvalidArgument, reason::kShape, kRuleRemedy,
                   "write lands in a parameter that does not exist: write={} position={} "
                   "parameters={}",
                   i, write.param, layout.params.size());
    }
    WEIGHTD_RETURN_IF_ERROR(CheckWrite(table, layout.params[write.param], write));
    ++first[write.param + 1];
  }
  std::partial_sum(first.begin(), first.end(), first.begin());
  std::vector<Box> targets(layout.writes.size());
  std::vector<uint32_t> next(first.begin(), first.end() - 1);
  for (const Write& write : layout.writes) targets[next[write.param]++] = write.target;
  for (size_t i = 0; i < layout.params.size(); ++i) {
    const auto of_param = std::span(targets).subspan(first[i], first[i + 1] - first[i]);
    WEIGHTD_RETURN_IF_ERROR(CheckParam(layout.params[i], of_param));
  }
  return absl::OkStatus();
}

void SourceUse::Add(const RankLayout& layout) {
  for (const Write& write : layout.writes) {
    if (!write.zero_fill) AddToUnion(read_[write.tensor], write.source);
  }
}

Status SourceUse::Check(const TensorTable& table, std::span<const uint32_t> skipped) const {
  for (uint32_t i = 0; i < table.size(); ++i) {
    const std::vector<Box>& read = read_[i];
    if (read.size() == 1 && read.front().extent == table[i].shape) continue;
    const std::optional<Box> gap = FindGap(table[i].shape, read);
    if (!gap || std::binary_search(skipped.begin(), skipped.end(), i)) continue;
    return MakeError(
        StatusCode::kInvalidArgument,
        fmt::format("source elements reach no engine rank: tensor={} shape={} left over={}",
                    table[i].name, ToString(table[i].shape), ToString(*gap)),
        {.reason = reason::kUnknownTensor,
         .tensor = table[i].name,
         .remedy = "add a rule for this tensor to the loader (`skip` if it is left out on purpose) "
                   "and register every rank of the engine"});
  }
  return absl::OkStatus();
}

Status CheckSourcesUsed(const TensorTable& table, std::span<const RankLayout* const> replica,
                        std::span<const uint32_t> skipped) {
  SourceUse use(table.size());
  for (const RankLayout* layout : replica) use.Add(*layout);
  return use.Check(table, skipped);
}

}  // namespace weightd
