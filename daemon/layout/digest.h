// The digest that proves a transfer: a multilinear hash that is additive over disjoint boxes.
//
// A source tensor, as cast to the destination dtype, is seen as rows of bytes: a row is the last
// dimension, rows are numbered row-major over the other dimensions of the *global source tensor*,
// before any transposition. A row is cut into little-endian 32-bit words, words into blocks of
// 1024. Word k of row r of tensor t with bits x contributes
//     RowWeight(t, r, k / 1024) * (x + kValueMask) * WordWeight(k % 1024)           (mod 2^64)
// and the digest of a tensor is the sum. An element narrower than a word contributes its own bits
// of the word, in place:
//     RowWeight * ((bits + mask) << 8 * (byte % 4)) * WordWeight      byte = column * element size
// with mask the same bits of kValueMask, so the sum over the elements of a word is the word's term
// and a sum over any set of boxes, taken in any order and on any device, is the same number. It
// costs one 32 x 32 + 64 multiply-add per word (per element where elements are handled one by one)
// and one 64-bit multiply-add per block; the masks of a run of words are one multiplication with a
// difference of kWordWeightSums. An 8-byte element is two words.
//
// What it finds: every change of a single word, every swap of two words of one block, and anything
// else with a chance of at least 1 - 2^-32 (the worst case is differences in the top bit of words
// only; typically 1 - 2^-48 and better). It is no cryptographic hash.
//
// Zero fill has a word of its own per engine rank: the number of elements, plus
// RowWeight(kZeroFillTensor, parameter, 0) for every element with any bit set.
#pragma once

#include <array>
#include <cstdint>

namespace weightd {

/// Words of a row that share one row weight, and bytes of such a block.
inline constexpr int64_t kDigestBlockWords = 1024;
inline constexpr int64_t kDigestBlockBytes = 4 * kDigestBlockWords;

/// The tensor number of the zero fill.
inline constexpr uint64_t kZeroFillTensor = ~uint64_t{0};

/// Added to every word (in 64 bits) so that zeros count.
inline constexpr uint32_t kValueMask = 0xa5c39d2bU;

/// Mixes 64 bits (the finaliser of SplitMix64, public domain).
constexpr uint64_t Mix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

/// The part of a row weight that depends on the tensor only.
constexpr uint64_t TensorKey(uint64_t tensor) { return Mix64(tensor); }

/// Odd 64-bit weight of block `block` of row `row` of the tensor with that key.
constexpr uint64_t RowWeightOfKey(uint64_t tensor_key, uint64_t row, uint64_t block) {
  return Mix64(Mix64(tensor_key ^ row) ^ (block * 0xd6e8feb86659fd93ULL)) | 1;
}

constexpr uint64_t RowWeight(uint64_t tensor, uint64_t row, uint64_t block) {
  return RowWeightOfKey(TensorKey(tensor), row, block);
}

/// Odd 32-bit weight of a word within its block. The weights of a block differ from each other.
constexpr uint32_t WordWeight(uint64_t word) {
  return static_cast<uint32_t>(Mix64(word ^ 0x5851f42d4c957f2dULL) >> 32) | 1;
}

/// Contribution, before the row weight, of one element of `size_bytes` 1, 2 or 4 at byte position
/// `byte` of its block. `bits` are zero-extended.
constexpr uint64_t ElementTerm(uint32_t bits, unsigned size_bytes, uint64_t byte) {
  const unsigned shift = 8 * static_cast<unsigned>(byte % 4);
  const uint32_t keep = size_bytes == 4 ? ~0U : (1U << (8 * size_bytes)) - 1;
  const uint32_t mask = kValueMask & (keep << shift);
  return (uint64_t{(bits & keep) << shift} + mask) * WordWeight(byte / 4);
}

namespace digest_internal {
constexpr std::array<uint32_t, kDigestBlockWords + 1> MakeWordWeights() {
  std::array<uint32_t, kDigestBlockWords + 1> weights{};
  for (size_t i = 0; i < kDigestBlockWords; ++i) weights[i] = WordWeight(i);
  return weights;
}

constexpr std::array<uint64_t, kDigestBlockWords + 1> MakeWordWeightSums() {
  std::array<uint64_t, kDigestBlockWords + 1> sums{};
  for (size_t i = 0; i < kDigestBlockWords; ++i) sums[i + 1] = sums[i] + WordWeight(i);
  return sums;
}
}  // namespace digest_internal

/// WordWeight of every word of a block; one entry more, so that a vector may be read one word late.
inline constexpr std::array<uint32_t, kDigestBlockWords + 1> kWordWeights =
    digest_internal::MakeWordWeights();

/// kWordWeightSums[k]: the sum of the weights of words [0, k).
inline constexpr std::array<uint64_t, kDigestBlockWords + 1> kWordWeightSums =
    digest_internal::MakeWordWeightSums();

}  // namespace weightd
