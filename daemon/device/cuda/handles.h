// CUDA's opaque handles as this tree names them, without CUDA's headers.
#pragma once

struct CUstream_st;
struct CUevent_st;

namespace weightd::cuda {

/// A stream that someone else owns (cudaStream_t). nullptr is the legacy default stream, which
/// nothing here accepts: it waits for every other stream of the process.
using StreamRef = CUstream_st*;
/// An event that someone else owns (cudaEvent_t).
using EventRef = CUevent_st*;

/// A device by its ordinal in this process. GPUs are told apart by UUID everywhere else.
enum class DeviceId : int {};

}  // namespace weightd::cuda
