// What mapping_owner.cc and mapping_test.cc agree on.
#pragma once

#include <cstddef>
#include <cstdint>

namespace weightd::testing {

inline constexpr size_t kPieceBytes = 2u << 20;
/// More pieces than one frame carries descriptors.
inline constexpr size_t kPieces = 300;
inline constexpr size_t kOffsetBytes = 512;
inline constexpr size_t kElements = (kPieces * kPieceBytes - 2 * kOffsetBytes) / 4;

inline uint32_t Pattern(size_t i) { return static_cast<uint32_t>(i * 2654435761u + 12345u); }

}  // namespace weightd::testing
