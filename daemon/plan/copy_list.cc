#include "daemon/plan/copy_list.h"

#include <algorithm>
#include <array>

namespace weightd {

int64_t CopyList::Number(const Head& head, int position) const {
  if (!head.wide) return numbers_[head.first + static_cast<size_t>(position)];
  const size_t low = head.first + 2 * static_cast<size_t>(position);
  return static_cast<int64_t>(numbers_[low] | static_cast<uint64_t>(numbers_[low + 1]) << 32);
}

Dims CopyList::Unpack(const Head& head, int position, int count) const {
  Dims dims;
  for (int i = 0; i < count; ++i) dims.push_back(Number(head, position + i));
  return dims;
}

Copy CopyList::operator[](size_t position) const {
  const Head& head = heads_[position];
  const int source = head.source_dims;
  const int target = head.target_dims;
  return {head.write,
          head.source_rank,
          head.shard,
          {Unpack(head, 0, source), Unpack(head, source, source)},
          {Unpack(head, 2 * source, target), Unpack(head, 2 * source + target, target)}};
}

uint64_t CopyList::TargetElements(size_t position) const {
  const Head& head = heads_[position];
  uint64_t elements = 1;
  for (int i = 0; i < head.target_dims; ++i) {
    elements *= static_cast<uint64_t>(Number(head, 2 * head.source_dims + head.target_dims + i));
  }
  return elements;
}

void CopyList::push_back(const Copy& copy) {
  std::array<int64_t, size_t{4} * kMaxDims> numbers;
  size_t count = 0;
  int64_t all_bits = 0;
  for (const Dims* dims :
       {&copy.source.origin, &copy.source.extent, &copy.target.origin, &copy.target.extent}) {
    for (int64_t number : *dims) {
      numbers[count++] = number;
      all_bits |= number;
    }
  }
  const bool wide = all_bits >> 32 != 0;
  heads_.push_back({numbers_.size(), copy.write, copy.source_rank, copy.shard,
                    static_cast<int8_t>(copy.source.num_dims()),
                    static_cast<int8_t>(copy.target.num_dims()), wide});
  std::array<uint32_t, size_t{8} * kMaxDims> words;
  size_t used = 0;
  for (size_t i = 0; i < count; ++i) {
    words[used++] = static_cast<uint32_t>(numbers[i]);
    if (wide) words[used++] = static_cast<uint32_t>(static_cast<uint64_t>(numbers[i]) >> 32);
  }
  numbers_.insert(numbers_.end(), words.begin(), words.begin() + static_cast<ptrdiff_t>(used));
}

void CopyList::SortByTarget(size_t begin) {
  const auto before = [this](const Head& a, const Head& b) {
    for (int i = 0; i < a.target_dims; ++i) {
      const int64_t left = Number(a, 2 * a.source_dims + i);
      const int64_t right = Number(b, 2 * b.source_dims + i);
      if (left != right) return left < right;
    }
    return false;
  };
  const auto first = heads_.begin() + static_cast<ptrdiff_t>(begin);
  if (!std::is_sorted(first, heads_.end(), before)) std::sort(first, heads_.end(), before);
}

}  // namespace weightd
