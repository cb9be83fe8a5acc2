#include "client/src/registration.h"

#include <algorithm>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <unordered_set>

#include "daemon/layout/stages.h"

namespace weightd {
namespace {

constexpr size_t kMaxNameBytes = 4096;

struct BoxHash {
  size_t operator()(const Box& box) const {
    uint64_t hash = 0x9e3779b97f4a7c15ULL;
    for (const Dims* dims : {&box.origin, &box.extent}) {
      for (int64_t value : *dims) {
        hash = (hash ^ static_cast<uint64_t>(value)) * 0xbf58476d1ce4e5b9ULL;
        hash ^= hash >> 29;
      }
    }
    return hash;
  }
};

Status Refuse(std::string_view reason, std::string_view remedy, const std::string& name,
              std::string_view message) {
  return WithTensor(
      Error(StatusCode::kInvalidArgument, reason, remedy, "{}: tensor={}", message, name), name);
}

/// Checks the parts that tensors and parameters share.
Status CheckForm(const char* name, int32_t dtype, int32_t num_dims, const int64_t* shape,
                 size_t index) {
  if (name == nullptr || *name == '\0' || std::string_view(name).size() > kMaxNameBytes) {
    return Error(StatusCode::kInvalidArgument, reason::kShape,
                 "give every tensor a name of 1 to 4096 bytes",
                 "tensor has no name or one that is too long: position={}", index);
  }
  if (dtype <= 0 || dtype >= kNumDTypes) {
    return Refuse(reason::kDtype, "register tensors of a dtype that weightd.h lists", name,
                  fmt::format("unknown dtype {}", dtype));
  }
  const bool dims_ok = num_dims >= 0 && num_dims <= kMaxDims;
  if (!dims_ok || !ValidShape({shape, static_cast<size_t>(num_dims)})) {
    return Refuse(reason::kShape,
                  "register tensors of at most 8 dimensions and fewer than 2^62 elements", name,
                  "shape cannot be used");
  }
  return absl::OkStatus();
}

Dims Read(const int64_t* values, int32_t num_dims) {
  return Dims(std::span(values, static_cast<size_t>(num_dims)));
}

/// Bytes from the first to the end of the last element; nullopt for strides that cannot be used.
std::optional<uint64_t> SpanBytes(const Dims& extent, const Dims& strides, size_t element_bytes) {
  constexpr auto kLimit = static_cast<__int128>(int64_t{1} << 62);
  __int128 last = 0;
  for (int d = 0; d < extent.size(); ++d) {
    if (strides[d] < 0) return std::nullopt;
    last += (static_cast<__int128>(extent[d]) - 1) * strides[d];
    if (last >= kLimit) return std::nullopt;
  }
  const __int128 bytes = (last + 1) * static_cast<__int128>(element_bytes);
  if (bytes >= kLimit) return std::nullopt;
  return static_cast<uint64_t>(bytes);
}

/// Reads where a block of shape `extent` lies and lends its segment. \pre the block is not empty
StatusOr<Placement> Place(const weightd_memory& memory, const Dims& extent, DType dtype,
                          const std::string& name, SegmentSet* segments) {
  Placement placement;
  placement.strides = Read(memory.strides, extent.size());
  placement.address = static_cast<const std::byte*>(memory.address);
  placement.offset_bytes = memory.offset_bytes;
  placement.cuda = memory.space == WEIGHTD_SPACE_CUDA;
  if (memory.fd < 0 && placement.address == nullptr) return placement;  // given at sync time
  const auto span = SpanBytes(extent, placement.strides, SizeBytes(dtype));
  if (!span.has_value()) {
    return Refuse(reason::kShape, "register tensors whose strides are not negative", name,
                  fmt::format("strides cannot be used: strides={}", ToString(placement.strides)));
  }
  if (placement.cuda) {
    const Status added = segments->cuda().Add(placement.address, *span);
    if (!added.ok()) return WithTensor(added, name);
    placement.segment = 0;  // numbered by PlaceCuda
    return placement;
  }
  if (memory.fd < 0) return placement;
  auto segment = segments->Add(memory.fd);
  if (!segment.ok()) return WithTensor(segment.status(), name);
  const uint64_t size = segments->segments()[*segment].size_bytes;
  if (memory.offset_bytes > size || *span > size - memory.offset_bytes) {
    return Refuse(reason::kSharedMemory,
                  "register the tensor again: its storage was moved, freed or truncated", name,
                  fmt::format("tensor leaves its shared memory: offset={} bytes={} object bytes={}",
                              memory.offset_bytes, *span, size));
  }
  placement.segment = *segment;
  return placement;
}

/// Gives blocks in GPU memory their segments, once all of them are known.
/// \error INVALID_ARGUMENT DEVICE if the rank lends memory of the host as well
Status PlaceCuda(SegmentSet* segments, std::vector<Placement>* memory) {
  if (segments->cuda().empty()) return absl::OkStatus();
  if (segments->first_cuda() > 0) {
    return Error(
        StatusCode::kInvalidArgument, reason::kDevice, "keep all tensors of one rank on one device",
        "rank has tensors in host memory and on a GPU: device={}", segments->cuda().device());
  }
  segments->cuda().Seal();
  for (Placement& placement : *memory) {
    if (!placement.cuda || !placement.segment.has_value()) continue;
    const CudaSegmentSet::Place place = segments->cuda().Find(placement.address);
    placement.segment = segments->first_cuda() + place.segment;
    placement.offset_bytes = place.offset_bytes;
  }
  return absl::OkStatus();
}

/// Memory of a stage may be that of other stages, which rest while it is written, but of nothing
/// else. Strided blocks count with what lies between their elements.
Status CheckStagedMemory(const EngineRegistration& registration) {
  struct Range {
    uint32_t segment;
    uint64_t begin, end;
    uint32_t param, stage;
  };
  const std::vector<ParamInfo>& params = registration.params;
  if (NumStages(params) == 0) return absl::OkStatus();
  std::vector<Range> ranges;
  for (uint32_t i = 0; i < params.size(); ++i) {
    const Placement& at = registration.memory[i];
    if (!at.segment.has_value() || !params[i].alias_of.empty()) continue;
    for (const ParamInfo& part : PartsOf(params[i])) {
      const auto bytes = SpanBytes(part.shape, at.strides, SizeBytes(part.dtype));
      const uint64_t end = at.offset_bytes + bytes.value_or(0);
      ranges.push_back({*at.segment, at.offset_bytes, end, i, part.stage});
    }
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
    return std::tie(a.segment, a.begin, a.param, a.stage) <
           std::tie(b.segment, b.begin, b.param, b.stage);
  });
  std::unordered_map<uint32_t, Range> last;  // by stage: of those so far the one that ends last
  std::optional<Range> last_staged;          // of all stages
  const auto meets = [&](const Range& range, const Range& before) {
    return before.segment == range.segment && before.end > range.begin;
  };
  for (const Range& range : ranges) {
    const uint32_t stage = range.stage;
    std::optional<Range> other;
    if (stage == 0 && last_staged.has_value() && meets(range, *last_staged)) other = last_staged;
    for (const uint32_t of : {stage, 0u}) {
      const auto before = stage == 0 ? last.end() : last.find(of);
      if (before != last.end() && meets(range, before->second)) other = before->second;
    }
    if (other.has_value()) {
      return Refuse(reason::kOverlap, "let only parameters of different stages share memory",
                    params[range.param].name,
                    fmt::format("memory of stage {} overlaps that of {} (stage {})", stage,
                                params[other->param].name, other->stage));
    }
    const auto extend = [&](Range& latest) {
      if (latest.segment != range.segment || latest.end < range.end) latest = range;
    };
    extend(last.try_emplace(stage, range).first->second);
    if (stage > 0) extend(last_staged.has_value() ? *last_staged : last_staged.emplace(range));
  }
  return absl::OkStatus();
}

/// Reads the boxes of one tensor and where they lie.
Status ReadShards(const weightd_tensor& tensor, const TensorInfo& info,
                  std::unordered_map<Box, uint32_t, BoxHash>* known, ActorRegistration* out) {
  const Box whole = WholeBox(info.shape);
  for (int32_t s = 0; s < tensor.num_shards; ++s) {
    const weightd_shard& shard = tensor.shards[s];
    const Box box{Read(shard.origin, tensor.num_dims), Read(shard.extent, tensor.num_dims)};
    for (int d = 0; d < tensor.num_dims; ++d) {
      if (box.origin[d] < 0 || box.extent[d] < 0 || box.extent[d] > whole.extent[d] ||
          box.origin[d] > whole.extent[d] - box.extent[d]) {
        return Refuse(reason::kShape, "pass boxes that lie inside the tensor's global shape",
                      info.name,
                      fmt::format("shard {} leaves its tensor: box={} shape={}", s, ToString(box),
                                  ToString(info.shape)));
      }
    }
    if (box.empty()) {
      out->caller_shard.push_back(-1);
      continue;
    }
    WEIGHTD_ASSIGN_OR_RETURN(Placement placement, Place(shard.memory, box.extent, info.dtype,
                                                        info.name, &out->segments));
    out->staged = out->staged || !placement.segment.has_value();
    const auto next = static_cast<uint32_t>(out->shards.boxes.size());
    const auto [entry, is_new] = known->try_emplace(box, next);
    if (is_new) out->shards.boxes.push_back(box);
    out->caller_shard.push_back(static_cast<int64_t>(out->memory.size()));
    out->shards.box_index.push_back(entry->second);
    out->memory.push_back(placement);
  }
  return absl::OkStatus();
}

/// Most descriptors that may be needed: one per block that is lent, fewer if they share objects.
template <typename Tensors, typename Lent>
size_t CountFds(const Tensors& tensors, Lent lent) {
  std::unordered_set<int> fds;
  for (const auto& tensor : tensors) lent(tensor, &fds);
  return fds.size();
}

}  // namespace

StatusOr<ActorRegistration> ReadTensors(std::span<const weightd_tensor> tensors) {
  WEIGHTD_RETURN_IF_ERROR(
      EnsureDescriptors(CountFds(tensors, [](const weightd_tensor& tensor, auto* fds) {
        for (int32_t s = 0; s < tensor.num_shards; ++s) {
          if (tensor.shards[s].memory.fd >= 0) fds->insert(tensor.shards[s].memory.fd);
        }
      })));
  ActorRegistration out;
  std::unordered_set<std::string_view> names;
  std::unordered_map<Box, uint32_t, BoxHash> known;
  out.table.reserve(tensors.size());
  for (const weightd_tensor& tensor : tensors) {
    WEIGHTD_RETURN_IF_ERROR(
        CheckForm(tensor.name, tensor.dtype, tensor.num_dims, tensor.shape, out.table.size()));
    TensorInfo info{tensor.name, Read(tensor.shape, tensor.num_dims),
                    static_cast<DType>(tensor.dtype)};
    if (!names.insert(tensor.name).second) {
      return Refuse(reason::kDuplicateTensor, "register every name once; see name_map", info.name,
                    "tensor is registered twice");
    }
    if (tensor.num_shards < 0 || (tensor.num_shards > 0 && tensor.shards == nullptr)) {
      return Refuse(reason::kShape, "pass as many shards as num_shards says", info.name,
                    fmt::format("number of shards cannot be used: {}", tensor.num_shards));
    }
    out.shards.first.push_back(static_cast<uint32_t>(out.memory.size()));
    out.caller_first.push_back(static_cast<uint32_t>(out.caller_shard.size()));
    WEIGHTD_RETURN_IF_ERROR(ReadShards(tensor, info, &known, &out));
    out.table.push_back(std::move(info));
  }
  out.shards.first.push_back(static_cast<uint32_t>(out.memory.size()));
  out.caller_first.push_back(static_cast<uint32_t>(out.caller_shard.size()));
  WEIGHTD_RETURN_IF_ERROR(PlaceCuda(&out.segments, &out.memory));
  return out;
}

StatusOr<EngineRegistration> ReadParams(std::span<const weightd_param> params) {
  WEIGHTD_RETURN_IF_ERROR(
      EnsureDescriptors(CountFds(params, [](const weightd_param& param, auto* fds) {
        if (param.memory.fd >= 0) fds->insert(param.memory.fd);
      })));
  EngineRegistration out;
  std::unordered_set<std::string_view> names;
  for (const weightd_param& param : params) {
    WEIGHTD_RETURN_IF_ERROR(
        CheckForm(param.name, param.dtype, param.num_dims, param.shape, out.params.size()));
    ParamInfo info{param.name,
                   Read(param.shape, param.num_dims),
                   static_cast<DType>(param.dtype),
                   static_cast<ParamKind>(param.kind),
                   param.alias_of == nullptr ? "" : param.alias_of,
                   param.stage,
                   param.pulled != 0,
                   param.stage_rows};
    if (param.kind < 1 || param.kind > 3) {
      return Refuse(reason::kProtocol, "pass kind 1 (raw), 2 (derived) or 3 (opaque)", info.name,
                    fmt::format("unknown parameter kind {}", param.kind));
    }
    if (!names.insert(param.name).second) {
      return Refuse(reason::kDuplicateTensor, "register every parameter once", info.name,
                    "parameter is registered twice");
    }
    Placement placement;
    const bool written = info.kind != ParamKind::kOpaque && info.alias_of.empty();
    if (written && NumElements(info.shape) > 0) {
      if (param.memory.fd < 0 && param.memory.space != WEIGHTD_SPACE_CUDA) {
        return Refuse(reason::kSharedMemory,
                      "move the parameter into shared memory before it is registered", info.name,
                      "parameter is not in shared memory");
      }
      WEIGHTD_ASSIGN_OR_RETURN(placement, Place(param.memory, PartsOf(info).front().shape,
                                                info.dtype, info.name, &out.segments));
      for (int d = 0; d < info.shape.size(); ++d) {
        if (info.shape[d] > 1 && placement.strides[d] == 0) {
          return Refuse(reason::kShape, "register a parameter that is not expanded", info.name,
                        "elements of the parameter share memory");
        }
      }
    }
    out.params.push_back(std::move(info));
    out.memory.push_back(placement);
  }
  for (const ParamInfo& param : out.params) {
    if (!param.alias_of.empty() && !names.contains(param.alias_of)) {
      return Refuse(reason::kUnknownTensor, "name a registered parameter in alias_of", param.name,
                    fmt::format("alias_of names no parameter: {}", param.alias_of));
    }
  }
  WEIGHTD_RETURN_IF_ERROR(PlaceCuda(&out.segments, &out.memory));
  WEIGHTD_RETURN_IF_ERROR(CheckStages(out.params));
  WEIGHTD_RETURN_IF_ERROR(CheckStagedMemory(out));
  return out;
}

}  // namespace weightd
