#include "client/src/cuda_fence.h"

#include <utility>

namespace weightd {

StatusOr<CudaFence> CudaFence::Create(cuda::DeviceOrdinal device) {
  CudaFence fence;
  fence.driver_ = cuda::LoadedDriver();
  WEIGHTD_CHECK(fence.driver_ != nullptr);
  fence.device_ = device;
  const cuda::Driver& driver = *fence.driver_;
  WEIGHTD_ASSIGN_OR_RETURN(const cuda::ScopedPrimaryContext current,
                           cuda::ScopedPrimaryContext::Enter(driver, device));
  WEIGHTD_RETURN_IF_ERROR(driver.ToStatus(
      driver.EventCreate(&fence.event_, cuda::kEventInterprocess), "cuEventCreate"));
  WEIGHTD_RETURN_IF_ERROR(driver.ToStatus(driver.IpcGetEventHandle(&fence.handle_, fence.event_),
                                          "cuIpcGetEventHandle"));
  return fence;
}

CudaFence::CudaFence(CudaFence&& other) noexcept { *this = std::move(other); }

CudaFence& CudaFence::operator=(CudaFence&& other) noexcept {
  std::swap(driver_, other.driver_);
  std::swap(device_, other.device_);
  std::swap(event_, other.event_);
  std::swap(handle_, other.handle_);
  return *this;
}

CudaFence::~CudaFence() {
  if (event_ == nullptr) return;
  const auto current = cuda::ScopedPrimaryContext::Enter(*driver_, device_);
  if (current.ok()) driver_->EventDestroy(event_);  // else it went with its context
}

std::string CudaFence::handle() const {
  return valid() ? std::string(handle_.bytes.data(), handle_.bytes.size()) : std::string();
}

Status CudaFence::Record(CUstream_st* stream) {
  WEIGHTD_ASSIGN_OR_RETURN(const cuda::ScopedPrimaryContext current,
                           cuda::ScopedPrimaryContext::Enter(*driver_, device_));
  return driver_->ToStatus(driver_->EventRecord(event_, stream), "cuEventRecord");
}

}  // namespace weightd
