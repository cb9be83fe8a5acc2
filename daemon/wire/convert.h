// weightd.v1 messages <-> domain values. The only place that knows both. Input from the wire is
// checked here.
#pragma once

#include "daemon/base/status.h"
#include "daemon/layout/tensor_layout.h"
#include "weightd/v1/types.pb.h"
#include "weightd/v1/worker.pb.h"

namespace weightd {

/// Status -> ErrorDetail, with all fields.
v1::ErrorDetail ToProto(const Status& status);
/// ErrorDetail -> Status. A detail with code 0 becomes OK.
Status FromProto(const v1::ErrorDetail& detail);

v1::Box ToProto(const Box& box);
/// \error INVALID_ARGUMENT PROTOCOL for more than kMaxDims, mismatched lengths or negative numbers
StatusOr<Box> FromProto(const v1::Box& box);

v1::TensorSpec ToProto(const TensorInfo& tensor);
/// \error INVALID_ARGUMENT SHAPE / DTYPE naming the tensor
StatusOr<TensorInfo> FromProto(const v1::TensorSpec& spec);

v1::ParamSpec ToProto(const ParamInfo& param);
/// \error INVALID_ARGUMENT SHAPE / DTYPE naming the parameter
StatusOr<ParamInfo> FromProto(const v1::ParamSpec& spec);

v1::EngineCoordinates ToProto(const EngineCoordinates& coordinates);
/// \error INVALID_ARGUMENT PROTOCOL if a rank is not below its size
StatusOr<EngineCoordinates> FromProto(const v1::EngineCoordinates& coordinates);

v1::WriteSpec ToProto(const Write& write);
/// \error INVALID_ARGUMENT PROTOCOL if the extents disagree
StatusOr<Write> FromProto(const v1::WriteSpec& spec);

/// A list of dimensions from the wire. \error INVALID_ARGUMENT SHAPE
StatusOr<Dims> DimsFromProto(const google::protobuf::RepeatedField<int64_t>& values);

/// Lower-case name of an enum value without its prefix: "transfer", "SERVING" keeps upper case for
/// states.
std::string PhaseName(v1::Phase phase);
std::string StateName(v1::EngineState state);

}  // namespace weightd
