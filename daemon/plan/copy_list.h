// The copies of a rank plan, packed: a plan of 100,000 tensors has millions of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <iterator>

#include "daemon/layout/box.h"

namespace weightd {

/// One copy: the part of a write that one actor rank supplies.
struct Copy {
  uint32_t write = 0;        ///< position in RankLayout::writes
  uint32_t source_rank = 0;  ///< actor rank; 0 for a zero fill
  uint32_t shard = 0;        ///< which of the rank's boxes of that tensor (position in its range of
                             ///< box_index); 0 for a zero fill
  Box source;  ///< global coordinates of the source tensor; no dimensions for a zero fill
  Box target;  ///< coordinates of the parameter
  bool operator==(const Copy&) const = default;
};

/// A list of copies of about 60 bytes each instead of 300. Elements are returned by value; the
/// list reads like a const std::deque<Copy> otherwise.
/// Thread safety: as std::deque.
class CopyList {
 public:
  class Iterator {
   public:
    using iterator_category = std::input_iterator_tag;
    using value_type = Copy;
    using difference_type = std::ptrdiff_t;
    using pointer = const Copy*;
    using reference = Copy;

    Iterator(const CopyList* list, size_t position) : list_(list), position_(position) {}
    Copy operator*() const { return (*list_)[position_]; }
    Iterator& operator++() {
      ++position_;
      return *this;
    }
    bool operator==(const Iterator&) const = default;

   private:
    const CopyList* list_;
    size_t position_;
  };

  size_t size() const { return heads_.size(); }
  bool empty() const { return heads_.empty(); }
  Copy operator[](size_t position) const;
  Iterator begin() const { return {this, 0}; }
  Iterator end() const { return {this, size()}; }

  /// Elements that a copy lands.
  uint64_t TargetElements(size_t position) const;

  void push_back(const Copy& copy);

  /// Sorts the copies from `begin` on by the origin of their targets, row-major.
  /// \pre these have equally many target dimensions
  void SortByTarget(size_t begin);

 private:
  struct Head {
    uint64_t first = 0;  ///< into numbers_: source origin, extent, target origin, extent
    uint32_t write = 0;
    uint32_t source_rank = 0;
    uint32_t shard = 0;
    int8_t source_dims = 0;
    int8_t target_dims = 0;
    bool wide = false;  ///< a number takes two words, low one first
  };
  int64_t Number(const Head& head, int position) const;
  Dims Unpack(const Head& head, int position, int count) const;

  std::deque<Head> heads_;  // deques: growing a vector would touch twice the memory
  std::deque<uint32_t> numbers_;
};

}  // namespace weightd
