#include "daemon/device/cuda/driver.h"

#include <dlfcn.h>

#include <utility>

namespace weightd::cuda {
namespace {

constexpr char kLibrary[] = "libcuda.so.1";

struct Symbol {
  const char* name;
  size_t offset;
};

#define WEIGHTD_SYMBOL(field, name) \
  { name, offsetof(Driver, field) }
constexpr Symbol kSymbols[] = {
    WEIGHTD_SYMBOL(Init, "cuInit"),
    WEIGHTD_SYMBOL(GetErrorName, "cuGetErrorName"),
    WEIGHTD_SYMBOL(DeviceGetCount, "cuDeviceGetCount"),
    WEIGHTD_SYMBOL(DeviceGet, "cuDeviceGet"),
    WEIGHTD_SYMBOL(DeviceGetUuid, "cuDeviceGetUuid_v2"),
    WEIGHTD_SYMBOL(DeviceCanAccessPeer, "cuDeviceCanAccessPeer"),
    WEIGHTD_SYMBOL(DevicePrimaryCtxGetState, "cuDevicePrimaryCtxGetState"),
    WEIGHTD_SYMBOL(DevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain"),
    WEIGHTD_SYMBOL(DevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2"),
    WEIGHTD_SYMBOL(CtxPushCurrent, "cuCtxPushCurrent_v2"),
    WEIGHTD_SYMBOL(CtxPopCurrent, "cuCtxPopCurrent_v2"),
    WEIGHTD_SYMBOL(PointerGetAttribute, "cuPointerGetAttribute"),
    WEIGHTD_SYMBOL(IpcGetMemHandle, "cuIpcGetMemHandle"),
    WEIGHTD_SYMBOL(IpcOpenMemHandle, "cuIpcOpenMemHandle_v2"),
    WEIGHTD_SYMBOL(IpcCloseMemHandle, "cuIpcCloseMemHandle"),
    WEIGHTD_SYMBOL(IpcGetEventHandle, "cuIpcGetEventHandle"),
    WEIGHTD_SYMBOL(IpcOpenEventHandle, "cuIpcOpenEventHandle"),
    WEIGHTD_SYMBOL(MemRetainAllocationHandle, "cuMemRetainAllocationHandle"),
    WEIGHTD_SYMBOL(MemRelease, "cuMemRelease"),
    WEIGHTD_SYMBOL(MemExportToShareableHandle, "cuMemExportToShareableHandle"),
    WEIGHTD_SYMBOL(MemImportFromShareableHandle, "cuMemImportFromShareableHandle"),
    WEIGHTD_SYMBOL(MemGetAllocationPropertiesFromHandle, "cuMemGetAllocationPropertiesFromHandle"),
    WEIGHTD_SYMBOL(MemAddressReserve, "cuMemAddressReserve"),
    WEIGHTD_SYMBOL(MemAddressFree, "cuMemAddressFree"),
    WEIGHTD_SYMBOL(MemMap, "cuMemMap"),
    WEIGHTD_SYMBOL(MemUnmap, "cuMemUnmap"),
    WEIGHTD_SYMBOL(MemSetAccess, "cuMemSetAccess"),
    WEIGHTD_SYMBOL(MemAlloc, "cuMemAlloc_v2"),
    WEIGHTD_SYMBOL(MemFree, "cuMemFree_v2"),
    WEIGHTD_SYMBOL(MemGetInfo, "cuMemGetInfo_v2"),
    WEIGHTD_SYMBOL(MemcpyDtoH, "cuMemcpyDtoH_v2"),
    WEIGHTD_SYMBOL(EventCreate, "cuEventCreate"),
    WEIGHTD_SYMBOL(EventDestroy, "cuEventDestroy_v2"),
    WEIGHTD_SYMBOL(EventRecord, "cuEventRecord"),
    WEIGHTD_SYMBOL(EventQuery, "cuEventQuery"),
};
#undef WEIGHTD_SYMBOL

Status NoDriver(std::string_view why) {
  return Error(StatusCode::kFailedPrecondition, reason::kDevice,
               "install the NVIDIA driver (525 or newer) and give the process access to the GPU",
               "the CUDA driver cannot be used: {}", why);
}

/// Fills the table from an open library. Empty, or the name of what is missing.
std::string Resolve(void* library, Driver* driver) {
  for (const Symbol& symbol : kSymbols) {
    void* address = ::dlsym(library, symbol.name);
    if (address == nullptr) return symbol.name;
    *reinterpret_cast<void**>(reinterpret_cast<char*>(driver) + symbol.offset) = address;
  }
  return "";
}

StatusOr<Driver> Load() {
  void* library =
      ::dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);  // stays loaded: the table points into it
  if (library == nullptr) return NoDriver("libcuda.so.1 is not installed");
  Driver driver{};
  const std::string missing = Resolve(library, &driver);
  if (!missing.empty()) return NoDriver(fmt::format("it is too old: missing={}", missing));
  const Result result = driver.Init(0);
  if (result != kSuccess) return NoDriver(Message(driver.ToStatus(result, "cuInit")));
  return driver;
}

}  // namespace

Status Driver::ToStatus(Result result, std::string_view what) const {
  if (result == kSuccess) return absl::OkStatus();
  const char* name = nullptr;
  if (GetErrorName(result, &name) != kSuccess || name == nullptr) name = "unknown error";
  const bool full = result == kOutOfMemory;
  return Error(full ? StatusCode::kResourceExhausted : StatusCode::kInternal, reason::kDevice,
               full ? "free memory on the GPU" : "see the log of the worker and of the driver",
               "{} failed: {} ({})", what, name, result);
}

StatusOr<const Driver*> LoadDriver() {
  static const StatusOr<Driver> driver = Load();
  if (!driver.ok()) return driver.status();
  return &*driver;
}

const Driver* LoadedDriver() {
  void* library = ::dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  ::dlclose(library);
  const StatusOr<const Driver*> driver = LoadDriver();
  return driver.ok() ? *driver : nullptr;
}

std::string ToString(const Uuid& uuid) {
  std::string text = "GPU-";
  for (size_t i = 0; i < uuid.bytes.size(); ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += fmt::format("{:02x}", uuid.bytes[i]);
  }
  return text;
}

StatusOr<std::vector<std::string>> ListDevices(const Driver& driver) {
  int count = 0;
  WEIGHTD_RETURN_IF_ERROR(driver.ToStatus(driver.DeviceGetCount(&count), "cuDeviceGetCount"));
  std::vector<std::string> devices;
  for (int i = 0; i < count; ++i) {
    DeviceOrdinal device = 0;
    Uuid uuid;
    WEIGHTD_RETURN_IF_ERROR(driver.ToStatus(driver.DeviceGet(&device, i), "cuDeviceGet"));
    WEIGHTD_RETURN_IF_ERROR(
        driver.ToStatus(driver.DeviceGetUuid(&uuid, device), "cuDeviceGetUuid"));
    devices.push_back(ToString(uuid));
  }
  return devices;
}

StatusOr<DeviceOrdinal> FindDevice(const Driver& driver, std::string_view uuid) {
  WEIGHTD_ASSIGN_OR_RETURN(const std::vector<std::string> devices, ListDevices(driver));
  for (size_t i = 0; i < devices.size(); ++i) {
    DeviceOrdinal device = 0;
    if (devices[i] != uuid) continue;
    WEIGHTD_RETURN_IF_ERROR(
        driver.ToStatus(driver.DeviceGet(&device, static_cast<int>(i)), "cuDeviceGet"));
    return device;
  }
  return Error(StatusCode::kNotFound, reason::kDevice,
               "use a UUID that `nvidia-smi -L` prints; a MIG slice cannot be served, and "
               "CUDA_VISIBLE_DEVICES of the daemon must not hide the GPU",
               "no such GPU: device={} visible=[{}]", uuid, fmt::join(devices, ", "));
}

StatusOr<ScopedPrimaryContext> ScopedPrimaryContext::Enter(const Driver& driver,
                                                           DeviceOrdinal device) {
  unsigned flags = 0;
  int active = 0;
  WEIGHTD_RETURN_IF_ERROR(driver.ToStatus(driver.DevicePrimaryCtxGetState(device, &flags, &active),
                                          "cuDevicePrimaryCtxGetState"));
  if (active == 0) {
    return Error(StatusCode::kFailedPrecondition, reason::kDevice,
                 "allocate the memory through the CUDA runtime (torch does)",
                 "process has no primary context on the GPU: ordinal={}", device);
  }
  CUctx_st* context = nullptr;
  WEIGHTD_RETURN_IF_ERROR(
      driver.ToStatus(driver.DevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain"));
  const Status pushed = driver.ToStatus(driver.CtxPushCurrent(context), "cuCtxPushCurrent");
  if (!pushed.ok()) {
    driver.DevicePrimaryCtxRelease(device);
    return pushed;
  }
  return ScopedPrimaryContext(&driver, device);
}

ScopedPrimaryContext::ScopedPrimaryContext(ScopedPrimaryContext&& other) noexcept
    : driver_(std::exchange(other.driver_, nullptr)), device_(other.device_) {}

ScopedPrimaryContext::~ScopedPrimaryContext() {
  if (driver_ == nullptr) return;
  CUctx_st* context = nullptr;
  driver_->CtxPopCurrent(&context);
  driver_->DevicePrimaryCtxRelease(device_);
}

}  // namespace weightd::cuda
