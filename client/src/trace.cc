#include <algorithm>

#include "client/src/registration.h"

namespace weightd {
namespace {

Status Refuse(const std::string& name, std::string_view message) {
  return WithTensor(Error(StatusCode::kInvalidArgument, reason::kShape,
                          "register the parameters that were traced, with the trace of this rank",
                          "{}: tensor={}", message, name),
                    name);
}

Dims Read(const int64_t* values, int num_dims) {
  return Dims(std::span(values, static_cast<size_t>(num_dims)));
}

bool Inside(const Box& box, const Shape& shape) {
  for (int d = 0; d < shape.size(); ++d) {
    if (box.origin[d] < 0 || box.extent[d] < 0 || box.extent[d] > shape[d] ||
        box.origin[d] > shape[d] - box.extent[d]) {
      return false;
    }
  }
  return true;
}

StatusOr<TracedSource> ReadSource(const weightd_traced_source& source, size_t index) {
  if (source.name == nullptr || *source.name == '\0') {
    return Error(StatusCode::kInvalidArgument, reason::kShape, "give every traced source a name",
                 "traced source has no name: position={}", index);
  }
  const bool dims_ok = source.num_dims >= 0 && source.num_dims <= kMaxDims;
  if (!dims_ok || !ValidShape({source.shape, static_cast<size_t>(source.num_dims)})) {
    return Refuse(source.name, "shape of a traced source cannot be used");
  }
  return TracedSource{.name = source.name, .shape = Read(source.shape, source.num_dims)};
}

StatusOr<Write> ReadWrite(const weightd_traced_write& traced,
                          const std::vector<TracedSource>& sources,
                          std::span<const ParamInfo> params) {
  Write write;
  write.param = traced.param;
  write.zero_fill = traced.source < 0;
  write.tensor = write.zero_fill ? 0 : static_cast<uint32_t>(traced.source);
  if (write.param >= params.size() || (!write.zero_fill && write.tensor >= sources.size())) {
    return Error(StatusCode::kInvalidArgument, reason::kProtocol,
                 "count parameters and sources from 0",
                 "a traced write is out of range: source={} of {} parameter={} of {}",
                 traced.source, sources.size(), traced.param, params.size());
  }
  const ParamInfo& param = params[write.param];
  write.target = {Read(traced.target_origin, param.shape.size()),
                  Read(traced.extent, param.shape.size())};
  if (!Inside(write.target, param.shape)) {
    return Refuse(param.name, fmt::format("a traced write leaves its parameter: box={} shape={}",
                                          ToString(write.target), ToString(param.shape)));
  }
  if (write.zero_fill) return write;
  const TracedSource& source = sources[write.tensor];
  write.source = {Read(traced.source_origin, source.shape.size()),
                  Dims::Filled(source.shape.size(), 1)};
  for (int j = 0; j < param.shape.size(); ++j) {
    const int dim = traced.source_dim[j];
    const bool fits =
        dim >= -1 && dim < source.shape.size() && (dim >= 0 || write.target.extent[j] == 1);
    if (!fits) return Refuse(param.name, "a traced write follows a dimension that does not exist");
    write.source_dim[static_cast<size_t>(j)] = static_cast<int8_t>(dim);
    if (dim >= 0) write.source.extent[dim] = write.target.extent[j];
  }
  if (!Inside(write.source, source.shape)) {
    return Refuse(source.name, fmt::format("a traced write leaves its source: box={} shape={}",
                                           ToString(write.source), ToString(source.shape)));
  }
  return write;
}

}  // namespace

StatusOr<std::shared_ptr<const TracedLayout>> ReadTrace(const weightd_trace& trace,
                                                        std::span<const ParamInfo> params) {
  std::vector<TracedSource> sources;
  sources.reserve(trace.num_sources);
  for (const weightd_traced_source& source : std::span(trace.sources, trace.num_sources)) {
    WEIGHTD_ASSIGN_OR_RETURN(sources.emplace_back(), ReadSource(source, sources.size()));
  }
  std::vector<Write> writes;
  writes.reserve(trace.num_writes);
  for (const weightd_traced_write& write : std::span(trace.writes, trace.num_writes)) {
    WEIGHTD_ASSIGN_OR_RETURN(writes.emplace_back(), ReadWrite(write, sources, params));
  }
  return TracedLayout::Create(std::move(sources), std::move(writes), params.size());
}

}  // namespace weightd
