// The safetensors format: eight bytes of header length (little endian), a JSON header
// {name: {"dtype", "shape", "data_offsets": [begin, end)}}, then the data, which the tensors cover
// without holes and without overlaps.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/layout/tensor_layout.h"

namespace weightd {

/// One tensor of a file.
struct StoredTensor {
  TensorInfo info;
  uint64_t begin = 0;  ///< bytes from the start of the file; any alignment
  uint64_t size_bytes = 0;
};

/// Longest header that is read, as in the reference implementation.
inline constexpr uint64_t kMostHeaderBytes = 100'000'000;

/// The tensors of a whole file in the order of their data, after every claim of the header was
/// checked against the file's size. `file` names it in errors.
/// \error INVALID_ARGUMENT CHECKPOINT, DUPLICATE_TENSOR, DTYPE, SHAPE, GAP or OVERLAP, naming the
/// file and, if one is concerned, the tensor
StatusOr<std::vector<StoredTensor>> ReadSafetensors(std::string_view bytes,
                                                    const std::string& file);

}  // namespace weightd
