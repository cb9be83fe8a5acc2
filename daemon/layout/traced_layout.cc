#include "daemon/layout/traced_layout.h"

#include <xxhash.h>

#include <algorithm>
#include <unordered_set>

#include "daemon/layout/name_distance.h"

namespace weightd {
namespace {

// Names compared when a tensor was not fed to the loader; the distance is quadratic in their
// length.
constexpr size_t kMaxCandidates = 4096;
constexpr char kNamesRemedy[] =
    "trace the engine's loader with the names and shapes that the trainer registers";

/// Feeds little-endian words to XXH3, so that the digest does not depend on the host.
class Hasher {
 public:
  Hasher() : state_(XXH3_createState()) {
    WEIGHTD_CHECK(state_ != nullptr);
    XXH3_128bits_reset(state_);
  }
  ~Hasher() { XXH3_freeState(state_); }
  Hasher(const Hasher&) = delete;
  Hasher& operator=(const Hasher&) = delete;

  void Word(uint64_t value) {
    uint8_t bytes[8];
    for (int i = 0; i < 8; ++i) bytes[i] = static_cast<uint8_t>(value >> (8 * i));
    XXH3_128bits_update(state_, bytes, sizeof(bytes));
  }
  void Text(std::string_view text) {
    Word(text.size());
    XXH3_128bits_update(state_, text.data(), text.size());
  }
  void Sizes(const Dims& dims) {
    Word(static_cast<uint64_t>(dims.size()));
    for (int64_t size : dims) Word(static_cast<uint64_t>(size));
  }
  std::array<uint8_t, 16> Finish() const {
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(state_));
    std::array<uint8_t, 16> digest{};
    std::copy(std::begin(canonical.digest), std::end(canonical.digest), digest.begin());
    return digest;
  }

 private:
  XXH3_state_t* state_;
};

Status Refuse(std::string_view reason, const std::string& tensor, std::string_view remedy,
              std::string_view message) {
  return WithTensor(
      Error(StatusCode::kInvalidArgument, reason, remedy, "{}: tensor={}", message, tensor),
      tensor);
}

}  // namespace

TracedLayout::TracedLayout(std::vector<TracedSource> sources, std::vector<Write> writes)
    : sources_(std::move(sources)), writes_(std::move(writes)) {
  Hasher hasher;
  hasher.Word(sources_.size());
  for (const TracedSource& source : sources_) {
    hasher.Text(source.name);
    hasher.Sizes(source.shape);
  }
  for (const Write& write : writes_) {
    hasher.Word(write.param);
    hasher.Word(write.zero_fill ? ~uint64_t{0} : write.tensor);
    hasher.Sizes(write.target.origin);
    hasher.Sizes(write.target.extent);
    if (write.zero_fill) continue;
    hasher.Sizes(write.source.origin);
    for (int i = 0; i < write.target.num_dims(); ++i) {
      hasher.Word(static_cast<uint64_t>(write.source_dim[static_cast<size_t>(i)]));
    }
  }
  digest_ = hasher.Finish();
}

StatusOr<std::shared_ptr<const TracedLayout>> TracedLayout::Create(
    std::vector<TracedSource> sources, std::vector<Write> writes, size_t num_params) {
  std::unordered_set<std::string_view> names;
  for (TracedSource& source : sources) {
    source.used = false;
    if (!names.insert(source.name).second) {
      return Refuse(reason::kDuplicateTensor, source.name, "feed every tensor to the loader once",
                    "a tensor is in the trace twice");
    }
  }
  for (const Write& write : writes) {
    if (write.param >= num_params || (!write.zero_fill && write.tensor >= sources.size())) {
      return Error(StatusCode::kInvalidArgument, reason::kProtocol,
                   "use the client library of this release",
                   "a traced write is out of range: source={} of {} parameter={} of {}",
                   write.tensor, sources.size(), write.param, num_params);
    }
    if (!write.zero_fill) sources[write.tensor].used = true;
  }
  return std::shared_ptr<const TracedLayout>(
      new TracedLayout(std::move(sources), std::move(writes)));
}

TraceBinder::TraceBinder(const TensorTable& table) : table_(table), seen_(table.size()) {
  for (uint32_t i = 0; i < table.size(); ++i) positions_.emplace(table[i].name, i);
}

StatusOr<RankLayout> TraceBinder::Lower(const TracedLayout& trace,
                                        const EngineCoordinates& coordinates,
                                        std::span<const ParamInfo> params) {
  std::vector<uint32_t> position(trace.sources().size());
  for (size_t i = 0; i < trace.sources().size(); ++i) {
    const TracedSource& source = trace.sources()[i];
    const auto found = positions_.find(source.name);
    if (found == positions_.end()) {
      if (!source.used) continue;  // neither side wants it
      return Refuse(reason::kMissingTensor, source.name, kNamesRemedy,
                    "the trainer lacks a tensor that the engine's loader places");
    }
    const TensorInfo& tensor = table_[found->second];
    if (source.used && tensor.shape != source.shape) {
      return Refuse(reason::kShape, source.name, kNamesRemedy,
                    fmt::format("the engine's loader was traced with another shape: traced={} "
                                "trainer={}",
                                ToString(source.shape), ToString(tensor.shape)));
    }
    position[i] = found->second;
    Seen& seen = seen_[found->second];
    seen = std::max(seen, source.used ? Seen::kUsed : Seen::kSkipped);
  }
  if (fed_.empty()) {
    for (const TracedSource& source : trace.sources()) fed_.push_back(source.name);
  }
  RankLayout layout{coordinates, {params.begin(), params.end()}, trace.writes()};
  for (Write& write : layout.writes) {
    write.tensor = write.zero_fill ? 0 : position[write.tensor];
  }
  return layout;
}

StatusOr<std::vector<uint32_t>> TraceBinder::Skipped() const {
  std::vector<uint32_t> skipped;
  for (uint32_t i = 0; i < table_.size(); ++i) {
    if (seen_[i] == Seen::kSkipped) skipped.push_back(i);
    if (seen_[i] != Seen::kNever) continue;
    std::vector<std::string> candidates = fed_;
    if (candidates.size() > kMaxCandidates) candidates.resize(kMaxCandidates);
    return Refuse(
        reason::kUnknownTensor, table_[i].name, kNamesRemedy,
        fmt::format("the engine's loader was traced without this tensor (nearest traced: {})",
                    fmt::join(NearestNames(table_[i].name, candidates, 3), ", ")));
  }
  return skipped;
}

}  // namespace weightd
