#include "daemon/plan/copy_list.h"

namespace weightd {
namespace {

Dims Unpack(const int64_t* numbers, int count) {
  return Dims(std::span<const int64_t>(numbers, static_cast<size_t>(count)));
}

}  // namespace

Copy CopyList::operator[](size_t position) const {
  const Head& head = heads_[position];
  const int64_t* source = numbers_.data() + head.first;
  const int64_t* target = source + 2 * head.source_dims;
  return {head.write,
          head.source_rank,
          head.shard,
          {Unpack(source, head.source_dims), Unpack(source + head.source_dims, head.source_dims)},
          {Unpack(target, head.target_dims), Unpack(target + head.target_dims, head.target_dims)}};
}

void CopyList::push_back(const Copy& copy) {
  heads_.push_back({numbers_.size(), copy.write, copy.source_rank, copy.shard,
                    static_cast<int8_t>(copy.source.num_dims()),
                    static_cast<int8_t>(copy.target.num_dims())});
  for (const Dims* dims :
       {&copy.source.origin, &copy.source.extent, &copy.target.origin, &copy.target.extent}) {
    numbers_.insert(numbers_.end(), dims->begin(), dims->end());
  }
}

void CopyList::shrink_to_fit() {
  heads_.shrink_to_fit();
  numbers_.shrink_to_fit();
}

}  // namespace weightd
