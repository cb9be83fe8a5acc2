#pragma once

#include <cstdint>

namespace weightd {

inline constexpr char kVersion[] = WEIGHTD_VERSION;

/// The protocol this build speaks (proto/weightd/v1, ProtocolVersion).
inline constexpr uint32_t kProtocolMajor = 1;
inline constexpr uint32_t kProtocolMinor = 3;

/// Largest message on any gRPC stream; tables and plans travel in pages below it.
inline constexpr int kMaxMessageBytes = 4 << 20;
inline constexpr int kPageBytes = 1 << 20;

}  // namespace weightd
