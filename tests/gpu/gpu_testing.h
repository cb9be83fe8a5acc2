// What the GPU tests share: device 0, a stream, bytes up and down, a table that is run.
#pragma once

#include <catch2/catch.hpp>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "daemon/device/cuda/box_kernels.h"
#include "daemon/device/cuda/buffer.h"
#include "daemon/device/cuda/stream.h"

namespace weightd::cuda {

inline constexpr DeviceId kDevice{0};

template <class T>
T Must(StatusOr<T> result) {
  INFO(result.status().ToString());
  REQUIRE(result.ok());
  return *std::move(result);
}

inline void Must(const Status& status) {
  INFO(status.ToString());
  REQUIRE(status.ok());
}

inline DeviceBuffer Uploaded(const std::vector<std::byte>& bytes, const Stream& stream) {
  DeviceBuffer buffer = Must(DeviceBuffer::Create(kDevice, bytes.size()));
  Must(buffer.Upload(bytes.data(), bytes.size(), 0, stream.ref()));
  Must(stream.Synchronize());
  return buffer;
}

inline std::vector<std::byte> Downloaded(const DeviceBuffer& buffer, const Stream& stream) {
  std::vector<std::byte> bytes(buffer.size_bytes());
  Must(buffer.Download(bytes.data(), bytes.size(), 0, stream.ref()));
  Must(stream.Synchronize());
  return bytes;
}

/// Runs windows [first, end) from cleared words and waits.
inline void Run(const BoxTable& table, uint32_t first, uint32_t end, DigestWords& words,
                int num_blocks, const Stream& stream) {
  Must(words.Clear(stream.ref()));
  Must(Launch(table, first, end, words, num_blocks, stream.ref()));
  Must(words.Fetch(stream.ref()));
  Must(stream.Synchronize());
}

}  // namespace weightd::cuda
