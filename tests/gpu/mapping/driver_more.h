// Driver functions that only tests need, found as the product finds its own.
#pragma once

#include <dlfcn.h>

#include <cstddef>

#include "daemon/device/cuda/driver.h"

namespace weightd::testing {

struct MoreDriver {
  cuda::Result (*MemAlloc)(cuda::DevicePtr* pointer, size_t size);
  cuda::Result (*MemAllocAsync)(cuda::DevicePtr* pointer, size_t size, CUstream_st* stream);
  cuda::Result (*MemCreate)(cuda::AllocationHandle* handle, size_t size,
                            const cuda::AllocationProperties* properties, unsigned long long flags);
  cuda::Result (*MemcpyHtoD)(cuda::DevicePtr to, const void* from, size_t size);
  cuda::Result (*MemGetInfo)(size_t* free, size_t* total);
  cuda::Result (*CtxSynchronize)();
};

inline MoreDriver LoadMoreDriver() {
  void* library = ::dlopen("libcuda.so.1", RTLD_NOW);
  MoreDriver driver{};
  const auto find = [library](auto& function, const char* name) {
    function =
        reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(library, name));
  };
  find(driver.MemAlloc, "cuMemAlloc_v2");
  find(driver.MemAllocAsync, "cuMemAllocAsync");
  find(driver.MemCreate, "cuMemCreate");
  find(driver.MemcpyHtoD, "cuMemcpyHtoD_v2");
  find(driver.MemGetInfo, "cuMemGetInfo_v2");
  find(driver.CtxSynchronize, "cuCtxSynchronize");
  return driver;
}

}  // namespace weightd::testing
