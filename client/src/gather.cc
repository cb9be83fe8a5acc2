#include "client/src/gather.h"

#include <cstdint>
#include <cstring>

namespace weightd {
namespace {

template <size_t kBytes>
void CopyRow(const std::byte* from, ptrdiff_t step, int64_t count, std::byte* out) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(out + i * kBytes, from + i * step, kBytes);
}

/// Copies `count` elements that lie `step` bytes apart.
void CopyStrided(const std::byte* from, ptrdiff_t step, int64_t count, size_t element_bytes,
                 std::byte* out) {
  switch (element_bytes) {
    case 1:
      return CopyRow<1>(from, step, count, out);
    case 2:
      return CopyRow<2>(from, step, count, out);
    case 4:
      return CopyRow<4>(from, step, count, out);
    default:
      return CopyRow<8>(from, step, count, out);
  }
}

}  // namespace

void Gather(const std::byte* base, const Dims& strides, const Box& part, size_t element_bytes,
            std::byte* out) {
  if (part.empty()) return;
  const auto bytes = static_cast<ptrdiff_t>(element_bytes);
  const std::byte* from = base;
  for (int d = 0; d < part.num_dims(); ++d) from += part.origin[d] * strides[d] * bytes;
  // A run is the longest row-major tail that is contiguous in the source as well.
  int outer = part.num_dims();
  int64_t run = 1;
  while (outer > 0 && (part.extent[outer - 1] == 1 || strides[outer - 1] == run)) {
    run *= part.extent[--outer];
  }
  // When not even the last dimension is contiguous, the row is copied element by element.
  const bool strided = outer == part.num_dims() && outer > 0;
  if (strided) --outer;
  const int64_t row = strided ? part.extent[outer] : run;
  Dims index = Dims::Filled(outer, 0);
  while (true) {
    if (strided) {
      CopyStrided(from, strides[outer] * bytes, row, element_bytes, out);
    } else {
      std::memcpy(out, from, static_cast<size_t>(run * bytes));
    }
    out += row * bytes;
    int d = outer - 1;
    for (; d >= 0; --d) {
      from += strides[d] * bytes;
      if (++index[d] < part.extent[d]) break;
      from -= part.extent[d] * strides[d] * bytes;
      index[d] = 0;
    }
    if (d < 0) return;
  }
}

}  // namespace weightd
