#include "daemon/transport/block_item.h"

#include <algorithm>

namespace weightd {
namespace {

int64_t ElementBytes(DType dtype) { return static_cast<int64_t>(SizeBytes(dtype)); }

// The dimension to cut into `wanted` parts: the outermost that is long enough, else the longest.
int CutDim(const Dims& extent, int64_t wanted) {
  int best = 0;
  for (int d = 0; d < extent.size(); ++d) {
    if (extent[d] >= wanted) return d;
    if (extent[d] > extent[best]) best = d;
  }
  return best;
}

}  // namespace

host::ConstBlock BindSource(const Binding& binding, const Box& held, const Box& box, DType dtype) {
  host::ConstBlock block;
  block.dtype = dtype;
  block.extent = box.extent;
  block.strides = binding.strides;
  int64_t offset = 0;
  for (int d = 0; d < box.num_dims(); ++d) {
    offset += (box.origin[d] - held.origin[d]) * binding.strides[d];
  }
  block.base = binding.base + offset * ElementBytes(dtype);
  return block;
}

host::Block BindTarget(const Binding& binding, const Write& write, const Box& box, int source_dims,
                       DType dtype) {
  host::Block block;
  block.dtype = dtype;
  int64_t offset = 0;
  for (int j = 0; j < box.num_dims(); ++j) offset += box.origin[j] * binding.strides[j];
  block.base = binding.base + offset * ElementBytes(dtype);
  if (write.zero_fill) {
    block.extent = box.extent;
    block.strides = binding.strides;
    return block;
  }
  block.extent = Dims::Filled(source_dims, 1);
  block.strides = Dims::Filled(source_dims, 0);
  for (int j = 0; j < box.num_dims(); ++j) {
    const int d = write.source_dim[static_cast<size_t>(j)];
    if (d < 0) continue;
    block.extent[d] = box.extent[j];
    block.strides[d] = binding.strides[j];
  }
  return block;
}

void AppendParts(const BlockItem& item, int64_t part_bytes, std::vector<BlockItem>& parts) {
  const Dims& extent = item.to.base != nullptr ? item.to.extent : item.from.extent;
  const int64_t from_bytes = item.from.base != nullptr ? ElementBytes(item.from.dtype) : 0;
  const int64_t to_bytes = item.to.base != nullptr ? ElementBytes(item.to.dtype) : 0;
  const int64_t bytes = NumElements(extent) * std::max(from_bytes, to_bytes);
  if (bytes == 0) return;
  const int64_t wanted = (bytes + part_bytes - 1) / part_bytes;
  if (wanted <= 1 || extent.empty()) {
    parts.push_back(item);
    return;
  }
  const int dim = CutDim(extent, wanted);
  const int64_t length = extent[dim];
  const int64_t step = std::max<int64_t>(1, length / wanted);
  for (int64_t begin = 0; begin < length; begin += step) {
    BlockItem part = item;
    const int64_t count = std::min(step, length - begin);
    if (part.from.base != nullptr) {
      part.from.base += begin * part.from.strides[dim] * from_bytes;
      part.from.extent[dim] = count;
    }
    if (part.to.base != nullptr) {
      part.to.base += begin * part.to.strides[dim] * to_bytes;
      part.to.extent[dim] = count;
    }
    if (!part.zero_fill) part.position.origin[dim] += begin;
    parts.push_back(part);
  }
}

void AppendChunks(const Box& box, int64_t max_elements, std::vector<Box>& chunks) {
  if (box.empty()) return;
  const int64_t elements = box.num_elements();
  if (elements <= std::max<int64_t>(1, max_elements)) {
    chunks.push_back(box);
    return;
  }
  int dim = 0;
  while (box.extent[dim] == 1) ++dim;
  const int64_t inner = elements / box.extent[dim];
  const int64_t step = std::max<int64_t>(1, max_elements / inner);
  for (int64_t begin = 0; begin < box.extent[dim]; begin += step) {
    Box chunk = box;
    chunk.origin[dim] += begin;
    chunk.extent[dim] = std::min(step, box.extent[dim] - begin);
    AppendChunks(chunk, max_elements, chunks);
  }
}

}  // namespace weightd
