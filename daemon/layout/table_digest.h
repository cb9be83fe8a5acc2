// The digest by which the ranks of a trainer agree that they registered the same tensors.
#pragma once

#include <array>
#include <cstdint>

#include "daemon/layout/tensor_layout.h"

namespace weightd {

/// XXH3-128, big endian, of the table in canonical form: the number of tensors as a 64-bit word,
/// then per tensor the length of its name (64-bit word), the name's bytes, the dtype and the number
/// of dimensions (one byte each) and the dimensions (64-bit words). Words are little endian.
/// ActorRegister.table_digest carries it.
std::array<uint8_t, 16> CanonicalTableDigest(const TensorTable& table);

}  // namespace weightd
