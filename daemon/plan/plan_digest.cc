#include "daemon/plan/plan_digest.h"

#include <xxhash.h>

#include <algorithm>
#include <string_view>

#include "daemon/layout/table_digest.h"

namespace weightd {

/// Feeds little-endian words to XXH3 through a buffer, so that the digest does not depend on the
/// host.
class PlanHasher::State {
 public:
  State() : xxh_(XXH3_createState()) {
    WEIGHTD_CHECK(xxh_ != nullptr);
    XXH3_128bits_reset(xxh_);
  }
  ~State() { XXH3_freeState(xxh_); }
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  template <typename T>
  void Word(T value) {
    if (used_ + sizeof(T) > buffer_.size()) Flush();
    for (size_t i = 0; i < sizeof(T); ++i) {
      buffer_[used_++] = static_cast<uint8_t>(static_cast<uint64_t>(value) >> (8 * i));
    }
  }

  void Text(std::string_view text) {
    Word<uint64_t>(text.size());
    Flush();
    XXH3_128bits_update(xxh_, text.data(), text.size());
  }

  void Sizes(const Dims& dims) {
    Word(static_cast<uint8_t>(dims.size()));
    for (int64_t size : dims) Word(size);
  }

  void Of(const Box& box) {
    Sizes(box.origin);
    Sizes(box.extent);
  }

  void List(std::span<const uint32_t> values) {
    Word<uint64_t>(values.size());
    for (uint32_t value : values) Word(value);
  }

  Digest128 Finish() {
    Flush();
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(xxh_));
    Digest128 digest{};
    std::copy(std::begin(canonical.digest), std::end(canonical.digest), digest.begin());
    return digest;
  }

 private:
  void Flush() {
    XXH3_128bits_update(xxh_, buffer_.data(), used_);
    used_ = 0;
  }

  XXH3_state_t* xxh_;
  std::array<uint8_t, 4096> buffer_{};
  size_t used_ = 0;
};

PlanHasher::PlanHasher(const TensorTable& table, std::span<const RankShards> shards,
                       size_t num_layouts, const WindowLimits& limits)
    : state_(std::make_unique<State>()) {
  for (uint8_t byte : CanonicalTableDigest(table)) state_->Word(byte);
  state_->Word<uint64_t>(shards.size());
  for (const RankShards& held : shards) {
    state_->Word<uint64_t>(held.boxes.size());
    for (const Box& box : held.boxes) state_->Of(box);
    state_->List(held.first);
    state_->List(held.box_index);
  }
  state_->Word(limits.bytes);
  state_->Word(limits.operations);
  state_->Word<uint64_t>(num_layouts);
}

PlanHasher::~PlanHasher() = default;

void PlanHasher::Add(const RankLayout& layout) {
  const EngineCoordinates& at = layout.coordinates;
  for (int value :
       {at.tp_rank, at.tp_size, at.pp_rank, at.pp_size, at.ep_rank, at.ep_size, at.dp_rank}) {
    state_->Word(static_cast<uint32_t>(value));
  }
  state_->Word<uint64_t>(layout.params.size());
  for (const ParamInfo& param : layout.params) {
    state_->Text(param.name);
    state_->Text(param.alias_of);
    state_->Sizes(param.shape);
    state_->Word(static_cast<uint8_t>(param.dtype));
    constexpr uint8_t kStaged = 0x80;
    constexpr uint8_t kPulled = 0x40;
    const auto kind = static_cast<uint8_t>(param.kind);
    const uint8_t flags = (param.stage == 0 ? 0 : kStaged) | (param.pulled ? kPulled : 0);
    state_->Word(static_cast<uint8_t>(kind | flags));
    if (param.stage != 0) state_->Word(param.stage);
  }
  state_->Word<uint64_t>(layout.writes.size());
  for (const Write& write : layout.writes) {
    state_->Word(write.param);
    state_->Of(write.target);
    state_->Word(static_cast<uint8_t>(write.zero_fill));
    if (write.zero_fill) continue;  // the rest has no meaning then
    state_->Word(write.tensor);
    state_->Of(write.source);
    for (int i = 0; i < write.target.num_dims(); ++i) {
      state_->Word(static_cast<uint8_t>(write.source_dim[static_cast<size_t>(i)]));
    }
  }
}

Digest128 PlanHasher::Finish() { return state_->Finish(); }

Digest128 PlanDigest(const TensorTable& table, std::span<const RankShards> shards,
                     std::span<const RankLayout* const> layouts, const WindowLimits& limits) {
  PlanHasher hasher(table, shards, layouts.size(), limits);
  for (const RankLayout* layout : layouts) hasher.Add(*layout);
  return hasher.Finish();
}

Digest128 TableDigest(const TensorTable& table) { return CanonicalTableDigest(table); }

}  // namespace weightd
