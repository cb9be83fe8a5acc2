#include "daemon/worker/catch_up.h"

#include <sys/mman.h>

#include <algorithm>
#include <thread>
#include <utility>

#include "daemon/device/host/box_copy.h"
#include "daemon/device/host/cast.h"
#include "daemon/device/host/digest.h"
#include "daemon/transport/block_item.h"

namespace weightd {
namespace {

constexpr int kMaxThreads = 8;
constexpr uint64_t kPartBytes = 1u << 20;    ///< one thread's share at a time
constexpr uint64_t kBatchBytes = 64u << 20;  ///< between looks at cancel and deadline
constexpr uint64_t kAlignBytes = 64;         ///< of parameters in a retained copy

/// What was transferred lies in the lent memory of raw and of derived parameters.
bool IsCopied(const ParamInfo& param) {
  return param.kind != ParamKind::kOpaque && param.alias_of.empty() && NumElements(param.shape) > 0;
}

uint64_t BytesOf(const ParamInfo& param) {
  return static_cast<uint64_t>(NumElements(param.shape)) * SizeBytes(param.dtype);
}

/// One part of one parameter.
struct Part {
  uint32_t param = 0;
  Box box;
};

std::byte* AddressOf(const Binding& binding, const Dims& origin, DType dtype) {
  int64_t elements = 0;
  for (int d = 0; d < origin.size(); ++d) elements += origin[d] * binding.strides[d];
  return binding.base + elements * static_cast<int64_t>(SizeBytes(dtype));
}

/// Copies a part and tells whether both memories are equal afterwards, each read anew.
bool CopyPart(const ParamInfo& param, const Box& box, const Binding& from, const Binding& to) {
  const host::RowKernels& kernels = host::BestKernels();
  const host::ConstBlock source{AddressOf(from, box.origin, param.dtype), param.dtype, box.extent,
                                from.strides};
  const host::Block target{AddressOf(to, box.origin, param.dtype), param.dtype, box.extent,
                           to.strides};
  host::CopyBlock(kernels, source, target, nullptr, false);
  const host::DigestPosition position{0, param.shape, box.origin};
  const host::ConstBlock landed{target.base, target.dtype, target.extent, target.strides};
  return host::DigestBlock(kernels, source, position) ==
         host::DigestBlock(kernels, landed, position);
}

std::vector<Part> PartsOf(const RankLayout& layout) {
  std::vector<Part> parts;
  std::vector<Box> boxes;
  for (uint32_t i = 0; i < layout.params.size(); ++i) {
    const ParamInfo& param = layout.params[i];
    if (!IsCopied(param)) continue;
    boxes.clear();
    AppendChunks(WholeBox(param.shape), static_cast<int64_t>(kPartBytes / SizeBytes(param.dtype)),
                 boxes);
    for (Box& box : boxes) parts.push_back({.param = i, .box = box});
  }
  return parts;
}

}  // namespace

/// A retained copy: anonymous memory, freed as a whole.
class CatchUp::HostCopy {
 public:
  static StatusOr<std::unique_ptr<HostCopy>> Create(const RankLayout& layout) {
    auto copy = std::make_unique<HostCopy>();
    copy->params = layout.params;
    std::vector<uint64_t> offsets;
    for (const ParamInfo& param : layout.params) {
      offsets.push_back(copy->size_bytes_);
      if (!IsCopied(param)) continue;
      copy->size_bytes_ += (BytesOf(param) + kAlignBytes - 1) / kAlignBytes * kAlignBytes;
    }
    copy->size_bytes_ = std::max<uint64_t>(copy->size_bytes_, 1);
    void* base = ::mmap(nullptr, copy->size_bytes_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) {
      return Error(StatusCode::kResourceExhausted, reason::kSharedMemory,
                   "free host memory or set catch_up.retain = \"none\"",
                   "no memory for a retained copy: bytes={}", copy->size_bytes_);
    }
    copy->base_ = static_cast<std::byte*>(base);
    for (size_t i = 0; i < layout.params.size(); ++i) {
      copy->bindings.push_back(
          {.base = copy->base_ + offsets[i], .strides = RowMajorStrides(layout.params[i].shape)});
    }
    return copy;
  }
  HostCopy() = default;
  HostCopy(const HostCopy&) = delete;
  HostCopy& operator=(const HostCopy&) = delete;
  ~HostCopy() {
    if (base_ != nullptr) ::munmap(base_, size_bytes_);
  }

  uint64_t version = 0;  ///< 0 while it is being written
  std::vector<ParamInfo> params;
  std::vector<Binding> bindings;

 private:
  std::byte* base_ = nullptr;
  uint64_t size_bytes_ = 0;
};

CatchUp::CatchUp(int num_threads) : num_threads_(num_threads) {}
CatchUp::~CatchUp() = default;

uint64_t ParamBytes(const RankLayout& layout) {
  uint64_t bytes = 0;
  for (const ParamInfo& param : layout.params) bytes += IsCopied(param) ? BytesOf(param) : 0;
  return bytes;
}

host::ThreadPool& CatchUp::pool() {
  if (pool_ == nullptr) {
    const int cores = static_cast<int>(std::thread::hardware_concurrency());
    pool_ = std::make_unique<host::ThreadPool>(
        num_threads_ > 0 ? num_threads_ : std::clamp(cores, 1, kMaxThreads));
  }
  return *pool_;
}

Status CatchUp::Check(const Control& control) const {
  if (control.cancelled != nullptr && control.cancelled->load()) {
    return Error(StatusCode::kCancelled, reason::kCancelled, "start the engine rank again",
                 "catch-up was cancelled");
  }
  if (Clock::now() > control.deadline) {
    return Error(StatusCode::kDeadlineExceeded, reason::kDeadline,
                 "raise the transfer deadline or give the worker more cores",
                 "catch-up ran out of time");
  }
  return absl::OkStatus();
}

Status CatchUp::Copy(const RankLayout& layout, std::span<const Binding> from,
                     std::span<const Binding> to, const Control& control) {
  const std::vector<Part> parts = PartsOf(layout);
  uint64_t copied = 0;
  for (size_t begin = 0, end = 0; begin < parts.size(); begin = end) {
    WEIGHTD_RETURN_IF_ERROR(Check(control));
    for (uint64_t bytes = 0; end < parts.size() && bytes < kBatchBytes; ++end) {
      const uint64_t size = static_cast<uint64_t>(parts[end].box.num_elements()) *
                            SizeBytes(layout.params[parts[end].param].dtype);
      bytes += size;
      copied += size;
    }
    std::atomic<size_t> different{parts.size()};
    pool().ParallelFor(end - begin, [&](size_t i) {
      const Part& part = parts[begin + i];
      if (!CopyPart(layout.params[part.param], part.box, from[part.param], to[part.param])) {
        different.store(begin + i);
      }
    });
    if (different.load() != parts.size()) {
      const std::string& name = layout.params[parts[different.load()].param].name;
      return WithTensor(Error(StatusCode::kDataLoss, reason::kVerifyMismatch,
                              "check that nothing writes to the engines' parameters, then retry",
                              "copied parameter differs from its source: param={}", name),
                        name);
    }
    if (control.on_bytes) control.on_bytes(copied);
  }
  return absl::OkStatus();
}

Status CatchUp::Retain(const std::string& label, uint64_t version, const RankLayout& layout,
                       std::span<const Binding> params, const Control& control) {
  std::unique_ptr<HostCopy>& copy = retained_[label];
  if (copy == nullptr || copy->params != layout.params) {
    copy = nullptr;  // before the new one, so that both never exist at a time
    StatusOr<std::unique_ptr<HostCopy>> created = HostCopy::Create(layout);
    if (!created.ok()) {
      retained_.erase(label);
      return created.status();
    }
    copy = *std::move(created);
  }
  copy->version = 0;
  WEIGHTD_RETURN_IF_ERROR(Copy(layout, params, copy->bindings, control));
  copy->version = version;
  return absl::OkStatus();
}

Status CatchUp::Restore(const std::string& label, uint64_t version, const RankLayout& layout,
                        std::span<const Binding> params, const Control& control) {
  const auto it = retained_.find(label);
  if (it == retained_.end() || it->second->version != version ||
      it->second->params != layout.params) {
    return Error(StatusCode::kNotFound, reason::kNoPlan, "wait for the next sync",
                 "no retained copy fits: rank={} version={} kept={}", label, version,
                 it == retained_.end() ? 0 : it->second->version);
  }
  return Copy(layout, it->second->bindings, params, control);
}

void CatchUp::DropRetained(uint64_t version) {
  std::erase_if(retained_,
                [version](const auto& entry) { return entry.second->version < version; });
}

}  // namespace weightd
