// The digest that proves a transfer: a multilinear hash that is additive over disjoint boxes.
//
// An element of source tensor t at global row-major position (row, column), column being the last
// dimension and row the flattened others, with value bits x in the destination dtype, contributes
//     RowWeight(t, row, column / 1024) * (x ^ ValueMask) * ColumnWeight(column % 1024)      (mod
//     2^64)
// so a sum over any set of boxes, taken in any order and on any device, is the same word. Zero fill
// contributes RowWeight(kZeroFillTensor, parameter, 0) times the number of elements that are not
// zero, plus the number of elements: it is defined where it is computed (device/digest.h).
#pragma once

#include <cstdint>

namespace weightd {

/// Columns that share one row weight.
inline constexpr int64_t kDigestBlock = 1024;

/// Mixes 64 bits (the finaliser of SplitMix64, public domain).
constexpr uint64_t Mix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

/// Odd 64-bit weight of block `block` of row `row` of tensor `tensor`.
constexpr uint64_t RowWeight(uint64_t tensor, uint64_t row, uint64_t block) {
  return Mix64(Mix64(Mix64(tensor) ^ row) ^ (block * 0xd6e8feb86659fd93ULL)) | 1;
}

/// Odd 32-bit weight of a column within its block.
constexpr uint32_t ColumnWeight(uint64_t column) {
  return static_cast<uint32_t>(Mix64(column ^ 0x5851f42d4c957f2dULL) >> 32) | 1;
}

/// XORed into the value bits so that zeros count; truncated to the element size.
inline constexpr uint32_t kValueMask = 0xa5c39d2bU;

}  // namespace weightd
