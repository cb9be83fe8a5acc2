// The floors of benchmark P11: the plainest kernels over one contiguous buffer, without boxes,
// bounds, digests or canonical NaNs.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace weightd::floors {

/// How a floor kernel is shaped; the benchmark tries all and keeps the fastest.
struct Shape {
  int vectors = 1;         ///< independent 16-byte loads per thread and round: 1, 2 or 4
  int blocks_per_sm = 2;   ///< 0: as many blocks as the buffer has rounds
  bool streaming = false;  ///< loads and stores marked as used once
};

/// Each returns a cudaError_t. Sizes are multiples of 64 KiB, addresses of 16 bytes.
int Copy(const void* from, void* to, uint64_t size_bytes, const Shape& shape, CUstream_st* stream);
/// float32 to bfloat16.
int Cast(const void* from, void* to, uint64_t elements, const Shape& shape, CUstream_st* stream);
/// Reads everything and writes nothing: the XOR of all words decides about one store to `sink`.
int Read(const void* from, uint64_t size_bytes, void* sink, const Shape& shape,
         CUstream_st* stream);

/// Fills with values like weights: random signs and significands, exponents of 2^-7 to 2^0, as
/// float32, or as bfloat16 pairs.
int Fill(void* to, uint64_t size_bytes, bool float32, CUstream_st* stream);

}  // namespace weightd::floors
