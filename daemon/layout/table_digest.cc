#include "daemon/layout/table_digest.h"

#include <xxhash.h>

#include <algorithm>
#include <memory>

namespace weightd {
namespace {

struct StateDeleter {
  void operator()(XXH3_state_t* state) const { XXH3_freeState(state); }
};

void AddWord(XXH3_state_t* state, uint64_t value) {
  uint8_t bytes[8];
  for (int i = 0; i < 8; ++i) bytes[i] = static_cast<uint8_t>(value >> (8 * i));
  XXH3_128bits_update(state, bytes, sizeof(bytes));
}

}  // namespace

std::array<uint8_t, 16> CanonicalTableDigest(const TensorTable& table) {
  const std::unique_ptr<XXH3_state_t, StateDeleter> state(XXH3_createState());
  XXH3_128bits_reset(state.get());
  AddWord(state.get(), table.size());
  for (const TensorInfo& tensor : table) {
    AddWord(state.get(), tensor.name.size());
    XXH3_128bits_update(state.get(), tensor.name.data(), tensor.name.size());
    const uint8_t form[2] = {static_cast<uint8_t>(tensor.dtype),
                             static_cast<uint8_t>(tensor.shape.size())};
    XXH3_128bits_update(state.get(), form, sizeof(form));
    for (int64_t size : tensor.shape) AddWord(state.get(), static_cast<uint64_t>(size));
  }
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(state.get()));
  std::array<uint8_t, 16> digest{};
  std::copy(std::begin(canonical.digest), std::end(canonical.digest), digest.begin());
  return digest;
}

}  // namespace weightd
