// Device, stream, event and buffers: thin owners of CUDA runtime handles.
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include "daemon/device/cuda/buffer.h"
#include "daemon/device/cuda/cuda_status.h"
#include "daemon/device/cuda/device.h"
#include "daemon/device/cuda/event.h"
#include "daemon/device/cuda/stream.h"

namespace weightd::cuda {
namespace {

// Destructors have nobody to report to; an error here also shows in the next call of its owner.
void Forget(cudaError_t error) {
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
}

}  // namespace

Status CheckAvailable() {
  int count = 0;
  WEIGHTD_RETURN_IF_ERROR(FromCuda(cudaGetDeviceCount(&count), "cannot count the GPUs"));
  return count > 0 ? absl::OkStatus() : FromCuda(cudaErrorNoDevice, "cannot count the GPUs");
}

StatusOr<int> NumMultiprocessors(DeviceId device) {
  int count = 0;
  WEIGHTD_RETURN_IF_ERROR(FromCuda(
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, static_cast<int>(device)),
      "cannot read the GPU's properties"));
  return count;
}

StatusOr<std::string> DeviceName(DeviceId device) {
  cudaDeviceProp properties;
  WEIGHTD_RETURN_IF_ERROR(FromCuda(cudaGetDeviceProperties(&properties, static_cast<int>(device)),
                                   "cannot read the GPU's properties"));
  return std::string(properties.name);
}

StatusOr<uint64_t> FreeBytes(DeviceId device) {
  const DeviceGuard guard(device);
  size_t free = 0, total = 0;
  WEIGHTD_RETURN_IF_ERROR(
      FromCuda(cudaMemGetInfo(&free, &total), "cannot read how much GPU memory is free"));
  return uint64_t{free};
}

DeviceGuard::DeviceGuard(DeviceId device) {
  int current = -1;
  Forget(cudaGetDevice(&current));
  if (current == static_cast<int>(device)) return;
  previous_ = current;
  Forget(cudaSetDevice(static_cast<int>(device)));
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) Forget(cudaSetDevice(previous_));
}

StatusOr<Stream> Stream::Create(DeviceId device, bool high_priority) {
  const DeviceGuard guard(device);
  int lowest = 0, highest = 0;
  WEIGHTD_RETURN_IF_ERROR(
      FromCuda(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "cannot use the GPU"));
  cudaStream_t stream = nullptr;
  WEIGHTD_RETURN_IF_ERROR(FromCuda(
      cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, high_priority ? highest : 0),
      "cannot create a stream"));
  return Stream(stream, device);
}

Stream& Stream::operator=(Stream&& other) noexcept {
  std::swap(stream_, other.stream_);
  std::swap(device_, other.device_);
  return *this;
}

Stream::~Stream() {
  if (stream_ == nullptr) return;
  const DeviceGuard guard(device_);
  Forget(cudaStreamDestroy(stream_));
}

Status Stream::Wait(EventRef event) const {
  const DeviceGuard guard(device_);
  return FromCuda(cudaStreamWaitEvent(stream_, event, 0), "cannot wait for an event");
}

Status Stream::Synchronize() const {
  const DeviceGuard guard(device_);
  return FromCuda(cudaStreamSynchronize(stream_), "the GPU's work failed");
}

StatusOr<Event> Event::Create(DeviceId device, Kind kind) {
  const DeviceGuard guard(device);
  cudaEvent_t event = nullptr;
  const unsigned flags = kind == Kind::kTiming ? cudaEventDefault : cudaEventDisableTiming;
  WEIGHTD_RETURN_IF_ERROR(
      FromCuda(cudaEventCreateWithFlags(&event, flags), "cannot create an event"));
  return Event(event, device);
}

Event& Event::operator=(Event&& other) noexcept {
  std::swap(event_, other.event_);
  std::swap(device_, other.device_);
  return *this;
}

Event::~Event() {
  if (event_ == nullptr) return;
  const DeviceGuard guard(device_);
  Forget(cudaEventDestroy(event_));
}

Status Event::Record(StreamRef stream) const {
  const DeviceGuard guard(device_);
  return FromCuda(cudaEventRecord(event_, stream), "cannot record an event");
}

StatusOr<bool> Event::Done() const {
  const cudaError_t error = cudaEventQuery(event_);
  if (error == cudaErrorNotReady) {
    Forget(error);
    return false;
  }
  WEIGHTD_RETURN_IF_ERROR(FromCuda(error, "the GPU's work failed"));
  return true;
}

Status Event::Synchronize() const {
  return FromCuda(cudaEventSynchronize(event_), "the GPU's work failed");
}

StatusOr<double> Event::SecondsSince(const Event& earlier) const {
  float milliseconds = 0;
  WEIGHTD_RETURN_IF_ERROR(FromCuda(cudaEventElapsedTime(&milliseconds, earlier.event_, event_),
                                   "cannot read the time between two events"));
  return static_cast<double>(milliseconds) * 1e-3;
}

StatusOr<DeviceBuffer> DeviceBuffer::Create(DeviceId device, uint64_t size_bytes) {
  void* data = nullptr;
  const DeviceGuard guard(device);
  if (size_bytes > 0) {
    WEIGHTD_RETURN_IF_ERROR(
        FromCuda(cudaMalloc(&data, size_bytes),
                 fmt::format("cannot allocate GPU memory: bytes={}", size_bytes)));
  }
  return DeviceBuffer(static_cast<std::byte*>(data), size_bytes, device);
}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_bytes_, other.size_bytes_);
  std::swap(device_, other.device_);
  return *this;
}

DeviceBuffer::~DeviceBuffer() {
  if (data_ == nullptr) return;
  const DeviceGuard guard(device_);
  Forget(cudaFree(data_));
}

Status DeviceBuffer::Upload(const void* from, uint64_t size_bytes, uint64_t offset,
                            StreamRef stream) {
  WEIGHTD_CHECK(offset <= size_bytes_ && size_bytes <= size_bytes_ - offset);
  if (size_bytes == 0) return absl::OkStatus();
  const DeviceGuard guard(device_);
  return FromCuda(cudaMemcpyAsync(data_ + offset, from, size_bytes, cudaMemcpyHostToDevice, stream),
                  "cannot copy to the GPU");
}

Status DeviceBuffer::Download(void* to, uint64_t size_bytes, uint64_t offset,
                              StreamRef stream) const {
  WEIGHTD_CHECK(offset <= size_bytes_ && size_bytes <= size_bytes_ - offset);
  if (size_bytes == 0) return absl::OkStatus();
  const DeviceGuard guard(device_);
  return FromCuda(cudaMemcpyAsync(to, data_ + offset, size_bytes, cudaMemcpyDeviceToHost, stream),
                  "cannot copy from the GPU");
}

Status DeviceBuffer::Clear(StreamRef stream) {
  if (size_bytes_ == 0) return absl::OkStatus();
  const DeviceGuard guard(device_);
  return FromCuda(cudaMemsetAsync(data_, 0, size_bytes_, stream), "cannot clear GPU memory");
}

StatusOr<PinnedBuffer> PinnedBuffer::Create(DeviceId device, uint64_t size_bytes) {
  void* data = nullptr;
  const DeviceGuard guard(device);
  if (size_bytes > 0) {
    WEIGHTD_RETURN_IF_ERROR(
        FromCuda(cudaHostAlloc(&data, size_bytes, cudaHostAllocPortable),
                 fmt::format("cannot allocate page-locked memory: bytes={}", size_bytes)));
  }
  return PinnedBuffer(static_cast<std::byte*>(data), size_bytes);
}

PinnedBuffer& PinnedBuffer::operator=(PinnedBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_bytes_, other.size_bytes_);
  return *this;
}

PinnedBuffer::~PinnedBuffer() {
  if (data_ != nullptr) Forget(cudaFreeHost(data_));
}

}  // namespace weightd::cuda
