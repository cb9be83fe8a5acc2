// A sleep-mode allocator for torch.cuda.memory.CUDAPluggableAllocator, as vLLM's cumem allocator
// and torch_memory_saver are: pages that can be taken away and brought back under the same address,
// made without a type of handle that another process could open.
#include <cuda.h>

#include <map>
#include <mutex>

namespace {
struct Pages {
  CUmemGenericAllocationHandle handle;
  size_t size;
  int device;
  bool mapped;
};
std::mutex mutex;
std::map<CUdeviceptr, Pages> all;

CUmemAllocationProp Properties(int device) {
  CUmemAllocationProp properties = {};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device}};
  properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_NONE;
  return properties;
}

bool Map(CUdeviceptr address, Pages* pages) {
  const CUmemAllocationProp properties = Properties(pages->device);
  CUmemAccessDesc access = {properties.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  pages->mapped = cuMemCreate(&pages->handle, pages->size, &properties, 0) == CUDA_SUCCESS &&
                  cuMemMap(address, pages->size, 0, pages->handle, 0) == CUDA_SUCCESS &&
                  cuMemSetAccess(address, pages->size, &access, 1) == CUDA_SUCCESS;
  return pages->mapped;
}

void Unmap(CUdeviceptr address, Pages* pages) {
  if (!pages->mapped) return;
  cuMemUnmap(address, pages->size);
  cuMemRelease(pages->handle);
  pages->mapped = false;
}
}  // namespace

extern "C" {
void* pool_malloc(ssize_t size, int device, CUstream) {
  const CUmemAllocationProp properties = Properties(device);
  size_t step = 0;
  cuMemGetAllocationGranularity(&step, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
  Pages pages = {0, (size + step - 1) / step * step, device, false};
  CUdeviceptr address = 0;
  if (cuMemAddressReserve(&address, pages.size, 0, 0, 0) != CUDA_SUCCESS) return nullptr;
  if (!Map(address, &pages)) return nullptr;
  const std::lock_guard lock(mutex);
  all[address] = pages;
  return reinterpret_cast<void*>(address);
}
void pool_free(void* pointer, ssize_t, int, CUstream) {
  const auto address = reinterpret_cast<CUdeviceptr>(pointer);
  const std::lock_guard lock(mutex);
  Unmap(address, &all[address]);
  cuMemAddressFree(address, all[address].size);
  all.erase(address);
}
void pool_sleep() {
  for (auto& [address, pages] : all) Unmap(address, &pages);
}
void pool_wake() {
  for (auto& [address, pages] : all) Map(address, &pages);
}
}
