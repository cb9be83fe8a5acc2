#include "tests/unit/client/client_testing.h"

#include <algorithm>
#include <numeric>

#include "daemon/base/status.h"

namespace weightd::testing {

SharedFloats::SharedFloats(size_t count)
    : fd(::memfd_create("tensor", MFD_CLOEXEC)), size_bytes(count * sizeof(float)) {
  WEIGHTD_CHECK(::ftruncate(fd.get(), static_cast<off_t>(size_bytes)) == 0);
  data = static_cast<float*>(
      ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0));
  std::iota(data, data + count, 0.0f);
}

SharedFloats::~SharedFloats() { ::munmap(data, size_bytes); }

weightd_memory SharedFloats::Memory(size_t offset_elements, std::vector<int64_t> strides) const {
  weightd_memory memory{};
  memory.fd = fd.get();
  memory.fd_size = size_bytes;
  memory.offset_bytes = offset_elements * sizeof(float);
  memory.address = data + offset_elements;
  std::copy(strides.begin(), strides.end(), memory.strides);
  return memory;
}

nlohmann::json TakeJson(char* text) {
  nlohmann::json json = nlohmann::json::parse(text);
  weightd_string_free(text);
  return json;
}

TensorOf::TensorOf(std::string tensor_name, std::vector<int64_t> tensor_shape, int64_t begin,
                   int64_t rows, weightd_memory memory)
    : name(std::move(tensor_name)), shape(std::move(tensor_shape)) {
  std::copy(shape.begin(), shape.end(), shard.extent);
  shard.origin[0] = begin;
  shard.extent[0] = rows;
  shard.memory = memory;
}

weightd_tensor TensorOf::View() const {
  weightd_tensor view{};
  view.name = name.c_str();
  view.dtype = 1;
  view.num_dims = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), view.shape);
  view.num_shards = 1;
  view.shards = &shard;
  return view;
}

}  // namespace weightd::testing
