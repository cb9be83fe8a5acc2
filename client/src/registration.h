// What a client registers: its tensors or parameters, checked and copied from the C ABI, and the
// memory that it lends.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "client/include/weightd/weightd.h"
#include "client/src/segments.h"
#include "daemon/base/status.h"
#include "daemon/layout/tensor_layout.h"
#include "daemon/layout/traced_layout.h"

namespace weightd {

/// Where a block of elements lies.
struct Placement {
  std::optional<uint32_t> segment;     ///< in the SegmentSet; none: staged
  uint64_t offset_bytes = 0;           ///< of the first element in the segment
  const std::byte* address = nullptr;  ///< in this process; nullptr: given at sync time
  Dims strides;                        ///< in elements
  bool cuda = false;                   ///< `address` is GPU memory
};

/// The shards of one trainer rank. Empty boxes are left out of `shards`.
/// \invariant memory.size() == shards.box_index.size()
struct ActorRegistration {
  TensorTable table;
  RankShards shards;
  std::vector<Placement> memory;
  SegmentSet segments;
  std::string event;    ///< GPU memory: what the worker waits for before it reads; see CudaFence
  bool staged = false;  ///< some shard is not lent

  /// For the caller's (tensor, shard): its position in `memory`; -1 if its box is empty.
  std::vector<uint32_t> caller_first;  ///< per tensor, position in caller_shard
  std::vector<int64_t> caller_shard;
};

/// \error INVALID_ARGUMENT DUPLICATE_TENSOR / SHAPE / DTYPE / SHARED_MEMORY naming the tensor
/// \error RESOURCE_EXHAUSTED FILE_DESCRIPTORS
StatusOr<ActorRegistration> ReadTensors(std::span<const weightd_tensor> tensors);

/// The parameters of one engine rank. \invariant memory.size() == params.size()
struct EngineRegistration {
  std::vector<ParamInfo> params;
  std::vector<Placement> memory;  ///< without a segment for opaque, aliased and empty parameters
  SegmentSet segments;
  std::shared_ptr<const TracedLayout> trace;  ///< nullptr: a rule file must describe the model
  bool prefer_trace = false;
};

/// \error as ReadTensors; INVALID_ARGUMENT UNKNOWN_TENSOR if alias_of names no parameter
StatusOr<EngineRegistration> ReadParams(std::span<const weightd_param> params);

/// Reads a trace of a rank that registers `params`.
/// \error INVALID_ARGUMENT SHAPE / DUPLICATE_TENSOR / PROTOCOL naming the tensor or parameter
StatusOr<std::shared_ptr<const TracedLayout>> ReadTrace(const weightd_trace& trace,
                                                        std::span<const ParamInfo> params);

}  // namespace weightd
