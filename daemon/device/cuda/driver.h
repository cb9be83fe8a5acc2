// The CUDA driver as far as memory, events and devices go, found at run time: neither the daemon
// nor the client library needs CUDA to be built or to start.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/status.h"

// The driver's own opaque types, as in cuda.h.
struct CUctx_st;
struct CUstream_st;
struct CUevent_st;

namespace weightd::cuda {

using Result = int;                 ///< CUresult
using DeviceOrdinal = int;          ///< CUdevice
using DevicePtr = uint64_t;         ///< CUdeviceptr
using AllocationHandle = uint64_t;  ///< CUmemGenericAllocationHandle

inline constexpr Result kSuccess = 0;
inline constexpr Result kOutOfMemory = 2;
inline constexpr Result kNotReady = 600;
inline constexpr Result kPeerAccessAlreadyEnabled = 704;

/// CUuuid; also what names a GPU everywhere in weightd.
struct Uuid {
  std::array<uint8_t, 16> bytes{};
  bool operator==(const Uuid&) const = default;
};

/// CUipcMemHandle and CUipcEventHandle: 64 opaque bytes that another process can open.
struct IpcHandle {
  std::array<char, 64> bytes{};
};

/// CUmemLocation.
struct Location {
  int type = 0;
  int id = 0;
};
inline constexpr int kLocationDevice = 1;

/// CUmemAllocationProp.
struct AllocationProperties {
  int type = 0;
  int handle_types = 0;
  Location location;
  void* win32_metadata = nullptr;
  std::array<uint8_t, 8> flags{};
};

/// CUmemAccessDesc.
struct AccessDescription {
  Location location;
  int flags = 0;
};
inline constexpr int kAccessRead = 1;
inline constexpr int kAccessReadWrite = 3;

/// CUmemAllocationHandleType.
inline constexpr int kHandlePosixFd = 1;

/// CUpointer_attribute.
enum class PointerAttribute : int {
  kMemoryType = 2,           ///< unsigned
  kBufferId = 7,             ///< uint64_t, unique in a process
  kIsManaged = 8,            ///< a flag, in a zeroed uint32_t
  kDeviceOrdinal = 9,        ///< int
  kIsLegacyIpcCapable = 10,  ///< likewise
  kRangeStart = 11,          ///< DevicePtr
  kRangeSize = 12,           ///< size_t
  kMempoolHandle = 17,       ///< pointer
  kMappingSize = 18,         ///< size_t
  kMappingBase = 19,         ///< DevicePtr
};
inline constexpr unsigned kMemoryTypeDevice = 2;

inline constexpr unsigned kIpcLazyEnablePeerAccess = 1;
inline constexpr unsigned kEventInterprocess = 2 | 4;  ///< with timing disabled, as it must be

/// The functions used, under the driver's names without "cu".
struct Driver {
  Result (*Init)(unsigned flags);
  Result (*GetErrorName)(Result error, const char** name);
  Result (*DeviceGetCount)(int* count);
  Result (*DeviceGet)(DeviceOrdinal* device, int ordinal);
  Result (*DeviceGetUuid)(Uuid* uuid, DeviceOrdinal device);
  Result (*DeviceCanAccessPeer)(int* can, DeviceOrdinal device, DeviceOrdinal peer);
  Result (*DevicePrimaryCtxGetState)(DeviceOrdinal device, unsigned* flags, int* active);
  Result (*DevicePrimaryCtxRetain)(CUctx_st** context, DeviceOrdinal device);
  Result (*DevicePrimaryCtxRelease)(DeviceOrdinal device);
  Result (*CtxPushCurrent)(CUctx_st* context);
  Result (*CtxPopCurrent)(CUctx_st** context);
  Result (*PointerGetAttribute)(void* value, int attribute, DevicePtr pointer);
  Result (*IpcGetMemHandle)(IpcHandle* handle, DevicePtr pointer);
  Result (*IpcOpenMemHandle)(DevicePtr* pointer, IpcHandle handle, unsigned flags);
  Result (*IpcCloseMemHandle)(DevicePtr pointer);
  Result (*IpcGetEventHandle)(IpcHandle* handle, CUevent_st* event);
  Result (*IpcOpenEventHandle)(CUevent_st** event, IpcHandle handle);
  Result (*MemRetainAllocationHandle)(AllocationHandle* handle, void* address);
  Result (*MemRelease)(AllocationHandle handle);
  Result (*MemExportToShareableHandle)(void* out, AllocationHandle handle, int type,
                                       unsigned long long flags);
  Result (*MemImportFromShareableHandle)(AllocationHandle* handle, void* os_handle, int type);
  Result (*MemGetAllocationPropertiesFromHandle)(AllocationProperties* out,
                                                 AllocationHandle handle);
  Result (*MemAddressReserve)(DevicePtr* pointer, size_t size, size_t alignment, DevicePtr at,
                              unsigned long long flags);
  Result (*MemAddressFree)(DevicePtr pointer, size_t size);
  Result (*MemMap)(DevicePtr pointer, size_t size, size_t offset, AllocationHandle handle,
                   unsigned long long flags);
  Result (*MemUnmap)(DevicePtr pointer, size_t size);
  Result (*MemSetAccess)(DevicePtr pointer, size_t size, const AccessDescription* access,
                         size_t count);
  Result (*MemAlloc)(DevicePtr* pointer, size_t size);
  Result (*MemFree)(DevicePtr pointer);
  Result (*MemGetInfo)(size_t* free, size_t* total);
  Result (*MemcpyDtoH)(void* to, DevicePtr from, size_t size);
  Result (*EventCreate)(CUevent_st** event, unsigned flags);
  Result (*EventDestroy)(CUevent_st* event);
  Result (*EventRecord)(CUevent_st* event, CUstream_st* stream);
  Result (*EventQuery)(CUevent_st* event);

  /// OK, or an error with the driver's own name of it. `what` says what was tried.
  Status ToStatus(Result result, std::string_view what) const;
  template <typename T>
  Result GetAttribute(PointerAttribute attribute, DevicePtr pointer, T* value) const {
    return PointerGetAttribute(value, static_cast<int>(attribute), pointer);
  }
};

/// The driver, loaded and initialised. Creates no context. The same object every time.
/// \error FAILED_PRECONDITION DEVICE if this machine has no usable driver
StatusOr<const Driver*> LoadDriver();

/// The driver if this process has loaded it already, else nullptr: a process that uses no GPU never
/// touches it through here.
const Driver* LoadedDriver();

/// "GPU-8f3a2c1e-...", as nvidia-smi prints it.
std::string ToString(const Uuid& uuid);

/// The ordinal of a GPU in this process. \error NOT_FOUND DEVICE naming the GPUs that are visible
StatusOr<DeviceOrdinal> FindDevice(const Driver& driver, std::string_view uuid);

/// All GPUs that this process sees, by ordinal.
StatusOr<std::vector<std::string>> ListDevices(const Driver& driver);

/// Makes the primary context of a GPU current on this thread for as long as it lives, if the
/// process has made it before: nothing is created. Thread safety: one thread.
class ScopedPrimaryContext {
 public:
  /// \error FAILED_PRECONDITION DEVICE if the process has no context on that GPU
  static StatusOr<ScopedPrimaryContext> Enter(const Driver& driver, DeviceOrdinal device);
  ScopedPrimaryContext(ScopedPrimaryContext&& other) noexcept;
  ScopedPrimaryContext& operator=(ScopedPrimaryContext&&) = delete;
  ~ScopedPrimaryContext();

 private:
  ScopedPrimaryContext(const Driver* driver, DeviceOrdinal device)
      : driver_(driver), device_(device) {}
  const Driver* driver_;
  DeviceOrdinal device_;
};

}  // namespace weightd::cuda
