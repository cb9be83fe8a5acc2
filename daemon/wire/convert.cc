#include "daemon/wire/convert.h"

#include <algorithm>
#include <cctype>

namespace weightd {
namespace {

constexpr char kUpgrade[] = "use the client library of this release";

void Append(const Dims& dims, google::protobuf::RepeatedField<int64_t>* out) {
  out->Reserve(dims.size());
  for (int64_t value : dims) out->Add(value);
}

StatusOr<DType> CheckDType(int value, const std::string& name) {
  if (value <= 0 || value >= kNumDTypes) {
    return WithTensor(Error(StatusCode::kInvalidArgument, reason::kDtype, kUpgrade,
                            "unknown dtype: tensor={} dtype={}", name, value),
                      name);
  }
  return static_cast<DType>(value);
}

StatusOr<Dims> CheckShape(const google::protobuf::RepeatedField<int64_t>& values,
                          const std::string& name) {
  const std::span<const int64_t> span(values.data(), static_cast<size_t>(values.size()));
  if (!ValidShape(span)) {
    return WithTensor(
        Error(StatusCode::kInvalidArgument, reason::kShape,
              "register tensors of at most 8 dimensions and fewer than 2^62 elements",
              "shape cannot be used: tensor={} shape=[{}]", name, fmt::join(span, ", ")),
        name);
  }
  return Dims(span);
}

}  // namespace

v1::ErrorDetail ToProto(const Status& status) {
  v1::ErrorDetail detail;
  if (status.ok()) return detail;
  const ErrorFields fields = FieldsOf(status);
  detail.set_code(static_cast<uint32_t>(status.code()));
  detail.set_message(Message(status));
  detail.set_reason(fields.reason);
  detail.set_tensor(fields.tensor);
  detail.set_rank(fields.rank);
  detail.set_phase(fields.phase);
  detail.set_peer(fields.peer);
  detail.set_remedy(fields.remedy);
  return detail;
}

Status FromProto(const v1::ErrorDetail& detail) {
  if (detail.code() == 0) return absl::OkStatus();
  const uint32_t code = std::min<uint32_t>(detail.code(), 16);
  return MakeError(static_cast<StatusCode>(code), detail.message(),
                   {.reason = detail.reason(),
                    .tensor = detail.tensor(),
                    .rank = detail.rank(),
                    .phase = detail.phase(),
                    .peer = detail.peer(),
                    .remedy = detail.remedy()});
}

StatusOr<Dims> DimsFromProto(const google::protobuf::RepeatedField<int64_t>& values) {
  return CheckShape(values, "");
}

v1::Box ToProto(const Box& box) {
  v1::Box proto;
  Append(box.origin, proto.mutable_origin());
  Append(box.extent, proto.mutable_extent());
  return proto;
}

StatusOr<Box> FromProto(const v1::Box& proto) {
  if (proto.origin_size() != proto.extent_size()) {
    return Error(StatusCode::kInvalidArgument, reason::kProtocol, kUpgrade,
                 "box has {} origins and {} extents", proto.origin_size(), proto.extent_size());
  }
  Box box;
  WEIGHTD_ASSIGN_OR_RETURN(box.extent, DimsFromProto(proto.extent()));
  if (std::any_of(proto.origin().begin(), proto.origin().end(),
                  [](int64_t v) { return v < 0 || v >= (int64_t{1} << 62); })) {
    return Error(StatusCode::kInvalidArgument, reason::kProtocol, kUpgrade,
                 "box origin is out of range");
  }
  box.origin = Dims(
      std::span<const int64_t>(proto.origin().data(), static_cast<size_t>(proto.origin_size())));
  return box;
}

v1::TensorSpec ToProto(const TensorInfo& tensor) {
  v1::TensorSpec spec;
  spec.set_name(tensor.name);
  Append(tensor.shape, spec.mutable_shape());
  spec.set_dtype(static_cast<v1::DType>(tensor.dtype));
  return spec;
}

StatusOr<TensorInfo> FromProto(const v1::TensorSpec& spec) {
  TensorInfo tensor;
  tensor.name = spec.name();
  WEIGHTD_ASSIGN_OR_RETURN(tensor.shape, CheckShape(spec.shape(), spec.name()));
  WEIGHTD_ASSIGN_OR_RETURN(tensor.dtype, CheckDType(spec.dtype(), spec.name()));
  return tensor;
}

v1::ParamSpec ToProto(const ParamInfo& param) {
  v1::ParamSpec spec;
  spec.set_name(param.name);
  Append(param.shape, spec.mutable_shape());
  spec.set_dtype(static_cast<v1::DType>(param.dtype));
  spec.set_kind(static_cast<v1::ParamKind>(param.kind));
  spec.set_alias_of(param.alias_of);
  spec.set_stage(param.stage);
  spec.set_pulled(param.pulled);
  spec.set_stage_rows(param.stage_rows);
  return spec;
}

StatusOr<ParamInfo> FromProto(const v1::ParamSpec& spec) {
  ParamInfo param;
  param.name = spec.name();
  WEIGHTD_ASSIGN_OR_RETURN(param.shape, CheckShape(spec.shape(), spec.name()));
  WEIGHTD_ASSIGN_OR_RETURN(param.dtype, CheckDType(spec.dtype(), spec.name()));
  if (spec.kind() < 1 || spec.kind() > 3) {
    return WithTensor(Error(StatusCode::kInvalidArgument, reason::kProtocol, kUpgrade,
                            "unknown parameter kind: param={} kind={}", spec.name(),
                            static_cast<int>(spec.kind())),
                      spec.name());
  }
  param.kind = static_cast<ParamKind>(spec.kind());
  param.alias_of = spec.alias_of();
  param.stage = spec.stage();
  param.pulled = spec.pulled();
  param.stage_rows = spec.stage_rows();
  return param;
}

v1::EngineCoordinates ToProto(const EngineCoordinates& coordinates) {
  v1::EngineCoordinates proto;
  proto.set_tp_rank(static_cast<uint32_t>(coordinates.tp_rank));
  proto.set_tp_size(static_cast<uint32_t>(coordinates.tp_size));
  proto.set_pp_rank(static_cast<uint32_t>(coordinates.pp_rank));
  proto.set_pp_size(static_cast<uint32_t>(coordinates.pp_size));
  proto.set_ep_rank(static_cast<uint32_t>(coordinates.ep_rank));
  proto.set_ep_size(static_cast<uint32_t>(coordinates.ep_size));
  proto.set_dp_rank(static_cast<uint32_t>(coordinates.dp_rank));
  return proto;
}

StatusOr<EngineCoordinates> FromProto(const v1::EngineCoordinates& proto) {
  constexpr uint32_t kLimit = 1u << 20;
  const auto size = [](uint32_t value) { return static_cast<int>(std::max<uint32_t>(value, 1)); };
  EngineCoordinates coordinates;
  for (uint32_t value : {proto.tp_rank(), proto.tp_size(), proto.pp_rank(), proto.pp_size(),
                         proto.ep_rank(), proto.ep_size(), proto.dp_rank()}) {
    if (value >= kLimit) {
      return Error(StatusCode::kInvalidArgument, reason::kProtocol, kUpgrade,
                   "engine coordinate is out of range: {}", value);
    }
  }
  coordinates.tp_rank = static_cast<int>(proto.tp_rank());
  coordinates.tp_size = size(proto.tp_size());
  coordinates.pp_rank = static_cast<int>(proto.pp_rank());
  coordinates.pp_size = size(proto.pp_size());
  coordinates.ep_rank = static_cast<int>(proto.ep_rank());
  coordinates.ep_size = size(proto.ep_size());
  coordinates.dp_rank = static_cast<int>(proto.dp_rank());
  if (coordinates.tp_rank >= coordinates.tp_size || coordinates.pp_rank >= coordinates.pp_size ||
      coordinates.ep_rank >= coordinates.ep_size) {
    return Error(StatusCode::kInvalidArgument, reason::kProtocol,
                 "pass ranks that are below their sizes",
                 "engine rank is not below its size: tp {}/{} pp {}/{} ep {}/{}",
                 coordinates.tp_rank, coordinates.tp_size, coordinates.pp_rank, coordinates.pp_size,
                 coordinates.ep_rank, coordinates.ep_size);
  }
  return coordinates;
}

v1::WriteSpec ToProto(const Write& write) {
  v1::WriteSpec spec;
  spec.set_source(write.tensor);
  spec.set_param(write.param);
  spec.set_zero_fill(write.zero_fill);
  Append(write.source.origin, spec.mutable_source_origin());
  Append(write.source.extent, spec.mutable_source_extent());
  Append(write.target.origin, spec.mutable_target_origin());
  Append(write.target.extent, spec.mutable_target_extent());
  if (!write.zero_fill) {
    for (int i = 0; i < write.target.num_dims(); ++i) {
      spec.add_source_dim(write.source_dim[static_cast<size_t>(i)]);
    }
  }
  return spec;
}

StatusOr<Write> FromProto(const v1::WriteSpec& spec) {
  const auto broken = [&spec](std::string_view what) {
    return Error(StatusCode::kInvalidArgument, reason::kProtocol, kUpgrade,
                 "write of parameter {} is malformed: {}", spec.param(), what);
  };
  Write write;
  write.tensor = spec.source();
  write.param = spec.param();
  write.zero_fill = spec.zero_fill();
  v1::Box box;
  *box.mutable_origin() = spec.target_origin();
  *box.mutable_extent() = spec.target_extent();
  WEIGHTD_ASSIGN_OR_RETURN(write.target, FromProto(box));
  if (write.zero_fill) return write;
  *box.mutable_origin() = spec.source_origin();
  *box.mutable_extent() = spec.source_extent();
  WEIGHTD_ASSIGN_OR_RETURN(write.source, FromProto(box));
  if (spec.source_dim_size() != write.target.num_dims()) return broken("source_dim");
  for (int i = 0; i < spec.source_dim_size(); ++i) {
    const int dim = spec.source_dim(i);
    if (dim < -1 || dim >= write.source.num_dims()) return broken("source_dim");
    const int64_t extent = dim < 0 ? 1 : write.source.extent[dim];
    if (write.target.extent[i] != extent) return broken("extents disagree");
    write.source_dim[static_cast<size_t>(i)] = static_cast<int8_t>(dim);
  }
  return write;
}

std::string PhaseName(v1::Phase phase) {
  std::string name = v1::Phase_Name(phase).substr(sizeof("PHASE_") - 1);
  std::transform(name.begin(), name.end(), name.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return name;
}

std::string StateName(v1::EngineState state) {
  return v1::EngineState_Name(state).substr(sizeof("ENGINE_STATE_") - 1);
}

}  // namespace weightd
