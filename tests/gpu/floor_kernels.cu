#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "tests/gpu/floor_kernels.h"

namespace weightd::floors {
namespace {

constexpr unsigned kThreads = 512;

template <bool kStreaming>
__device__ __forceinline__ uint4 LoadVector(const uint4* from) {
  return kStreaming ? __ldcs(from) : *from;
}

template <bool kStreaming>
__device__ __forceinline__ void StoreVector(uint4* to, uint4 value) {
  if (kStreaming) {
    __stcs(to, value);
  } else {
    *to = value;
  }
}

__device__ __forceinline__ unsigned Pack(unsigned low, unsigned high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(__uint_as_float(low), __uint_as_float(high));
  return *reinterpret_cast<const unsigned*>(&pair);
}

template <int kVectors, bool kStreaming>
__global__ void CopyKernel(const uint4* from, uint4* to, uint64_t count) {
  const uint64_t stride = uint64_t{gridDim.x} * kThreads;
  uint64_t i = blockIdx.x * uint64_t{kThreads} + threadIdx.x;
  for (; i + (kVectors - 1) * stride < count; i += kVectors * stride) {
    uint4 values[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; ++j) values[j] = LoadVector<kStreaming>(from + i + j * stride);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) StoreVector<kStreaming>(to + i + j * stride, values[j]);
  }
  for (; i < count; i += stride) StoreVector<kStreaming>(to + i, LoadVector<kStreaming>(from + i));
}

// `count` vectors of eight elements.
template <int kVectors, bool kStreaming>
__global__ void CastKernel(const uint4* from, uint4* to, uint64_t count) {
  const uint64_t stride = uint64_t{gridDim.x} * kThreads;
  const auto cast = [](const uint4& a, const uint4& b) {
    return uint4{Pack(a.x, a.y), Pack(a.z, a.w), Pack(b.x, b.y), Pack(b.z, b.w)};
  };
  uint64_t i = blockIdx.x * uint64_t{kThreads} + threadIdx.x;
  for (; i + (kVectors - 1) * stride < count; i += kVectors * stride) {
    uint4 a[kVectors], b[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      a[j] = LoadVector<kStreaming>(from + 2 * (i + j * stride));
      b[j] = LoadVector<kStreaming>(from + 2 * (i + j * stride) + 1);
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      StoreVector<kStreaming>(to + i + j * stride, cast(a[j], b[j]));
    }
  }
  for (; i < count; i += stride) {
    StoreVector<kStreaming>(to + i, cast(LoadVector<kStreaming>(from + 2 * i),
                                         LoadVector<kStreaming>(from + 2 * i + 1)));
  }
}

template <int kVectors, bool kStreaming>
__global__ void ReadKernel(const uint4* from, uint64_t count, unsigned* sink) {
  const uint64_t stride = uint64_t{gridDim.x} * kThreads;
  unsigned sum = 0;
  uint64_t i = blockIdx.x * uint64_t{kThreads} + threadIdx.x;
  for (; i + (kVectors - 1) * stride < count; i += kVectors * stride) {
    uint4 values[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; ++j) values[j] = LoadVector<kStreaming>(from + i + j * stride);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      sum ^= values[j].x ^ values[j].y ^ values[j].z ^ values[j].w;
    }
  }
  for (; i < count; i += stride) {
    const uint4 value = LoadVector<kStreaming>(from + i);
    sum ^= value.x ^ value.y ^ value.z ^ value.w;
  }
  if (sum == 0x12345678U) *sink = sum;
}

__global__ void FillKernel(uint32_t* to, uint64_t count, bool float32) {
  const uint64_t stride = uint64_t{gridDim.x} * kThreads;
  for (uint64_t i = blockIdx.x * uint64_t{kThreads} + threadIdx.x; i < count; i += stride) {
    uint64_t bits = (i + 1) * 0x9e3779b97f4a7c15ULL;
    bits = (bits ^ (bits >> 31)) * 0xbf58476d1ce4e5b9ULL;
    const auto word = static_cast<uint32_t>(bits >> 32);
    to[i] = float32 ? (word & 0x83ffffffU) | 0x3c000000U : (word & 0x83ff83ffU) | 0x3c003c00U;
  }
}

unsigned Blocks(uint64_t count, const Shape& shape) {
  if (shape.blocks_per_sm == 0) {
    const uint64_t per_block = uint64_t{kThreads} * static_cast<unsigned>(shape.vectors);
    return static_cast<unsigned>((count + per_block - 1) / per_block);
  }
  int device = 0, multiprocessors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  return static_cast<unsigned>(multiprocessors * shape.blocks_per_sm);
}

// Calls run with the shape's numbers as constants.
template <class Run>
int Dispatch(const Shape& shape, Run run) {
  const auto with_hint = [&]<int kVectors>() {
    if (shape.streaming) {
      run.template operator()<kVectors, true>();
    } else {
      run.template operator()<kVectors, false>();
    }
  };
  if (shape.vectors == 1) {
    with_hint.template operator()<1>();
  } else if (shape.vectors == 2) {
    with_hint.template operator()<2>();
  } else {
    with_hint.template operator()<4>();
  }
  return cudaGetLastError();
}

}  // namespace

int Copy(const void* from, void* to, uint64_t size_bytes, const Shape& shape, CUstream_st* stream) {
  const uint64_t count = size_bytes / sizeof(uint4);
  return Dispatch(shape, [&]<int kVectors, bool kStreaming>() {
    CopyKernel<kVectors, kStreaming><<<Blocks(count, shape), kThreads, 0, stream>>>(
        static_cast<const uint4*>(from), static_cast<uint4*>(to), count);
  });
}

int Cast(const void* from, void* to, uint64_t elements, const Shape& shape, CUstream_st* stream) {
  const uint64_t count = elements / 8;
  return Dispatch(shape, [&]<int kVectors, bool kStreaming>() {
    CastKernel<kVectors, kStreaming><<<Blocks(count, shape), kThreads, 0, stream>>>(
        static_cast<const uint4*>(from), static_cast<uint4*>(to), count);
  });
}

int Read(const void* from, uint64_t size_bytes, void* sink, const Shape& shape,
         CUstream_st* stream) {
  const uint64_t count = size_bytes / sizeof(uint4);
  return Dispatch(shape, [&]<int kVectors, bool kStreaming>() {
    ReadKernel<kVectors, kStreaming><<<Blocks(count, shape), kThreads, 0, stream>>>(
        static_cast<const uint4*>(from), count, static_cast<unsigned*>(sink));
  });
}

int Fill(void* to, uint64_t size_bytes, bool float32, CUstream_st* stream) {
  FillKernel<<<1024, kThreads, 0, stream>>>(static_cast<uint32_t*>(to), size_bytes / 4, float32);
  return cudaGetLastError();
}

}  // namespace weightd::floors
