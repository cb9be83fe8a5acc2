#include "daemon/transport/nccl/nccl_library.h"

#include <dlfcn.h>

#include <algorithm>
#include <iterator>

namespace weightd {
namespace {

/// True of NCCL's text when an allocation or a launch found no device memory.
bool SaysNoMemory(std::string_view text) {
  constexpr std::string_view kTexts[] = {"out of memory", "Failed to CUDA calloc",
                                         "Failed to CUDA malloc"};
  return std::any_of(std::begin(kTexts), std::end(kTexts), [&](std::string_view known) {
    return text.find(known) != std::string_view::npos;
  });
}

constexpr char kRemedy[] =
    "install NCCL 2.28 (libnccl.so.2), or name its folder in LD_LIBRARY_PATH of the daemon";

StatusOr<NcclLibrary> Load() {
  void* const handle = ::dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    return Error(StatusCode::kNotFound, reason::kNoPath, kRemedy, "NCCL cannot be loaded: {}",
                 ::dlerror());
  }
  NcclLibrary library{};
  const char* missing = nullptr;
  const auto find = [&](auto* function, const char* name) {
    *reinterpret_cast<void**>(function) = ::dlsym(handle, name);
    if (*function == nullptr) missing = name;
  };
  find(&library.GetVersion, "ncclGetVersion");
  find(&library.GetUniqueId, "ncclGetUniqueId");
  find(&library.CommInitRankConfig, "ncclCommInitRankConfig");
  find(&library.CommGetAsyncError, "ncclCommGetAsyncError");
  find(&library.CommAbort, "ncclCommAbort");
  find(&library.GroupStart, "ncclGroupStart");
  find(&library.GroupEnd, "ncclGroupEnd");
  find(&library.Send, "ncclSend");
  find(&library.Recv, "ncclRecv");
  find(&library.GetErrorString, "ncclGetErrorString");
  find(&library.GetLastError, "ncclGetLastError");
  if (missing != nullptr || library.GetVersion(&library.version) != ncclSuccess) {
    return Error(StatusCode::kNotFound, reason::kNoPath, kRemedy,
                 "this libnccl.so.2 is too old: it lacks {}", missing == nullptr ? "" : missing);
  }
  return library;
}

}  // namespace

Status NcclLibrary::ToStatus(ncclResult_t result, std::string_view what, ncclComm_t comm) const {
  if (result == ncclSuccess || result == ncclInProgress) return absl::OkStatus();
  if (SaysNoMemory(GetLastError(comm))) {
    return Error(StatusCode::kResourceExhausted, reason::kGpuMemory,
                 "leave the GPU some 700 MiB for NCCL beside worker.wire_bytes (e.g. by vLLM's "
                 "gpu_memory_utilization)",
                 "no memory for NCCL: {}: {}", what, GetLastError(comm));
  }
  return Error(StatusCode::kUnavailable, reason::kWire,
               "sync again; if it repeats, set NCCL_DEBUG=WARN for the daemon and read its log",
               "NCCL: {}: {} ({})", what, GetErrorString(result), GetLastError(comm));
}

StatusOr<const NcclLibrary*> LoadNccl() {
  static const StatusOr<NcclLibrary> library = Load();
  if (!library.ok()) return library.status();
  return &*library;
}

}  // namespace weightd
