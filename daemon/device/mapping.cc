#include "daemon/device/mapping.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "daemon/device/sigbus_guard.h"

namespace weightd {
namespace {

// Since Linux 5.14; an older kernel refuses, and the pages then come one by one.
constexpr int kPopulateRead = 22;
constexpr int kPopulateWrite = 23;
constexpr uint64_t kStatBlockBytes = 512;

constexpr char kLendRemedy[] =
    "lend a memfd or a file of /dev/shm that is at least as large as claimed and open for reading "
    "and writing";

uint64_t RoundToPages(uint64_t size_bytes) {
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  return (size_bytes + page - 1) / page * page;
}

bool CannotShrink(int fd) {
  const int seals = fcntl(fd, F_GET_SEALS);
  return seals >= 0 && (seals & F_SEAL_SHRINK) != 0;
}

Status MapError(const std::string& label, uint64_t size_bytes, int error) {
  if (error == EACCES || error == EPERM) {
    return Error(StatusCode::kInvalidArgument, reason::kSharedMemory, kLendRemedy,
                 "shared memory cannot be mapped with the access needed: {}, size_bytes={}", label,
                 size_bytes);
  }
  return Error(StatusCode::kResourceExhausted, reason::kSharedMemory,
               "raise the worker's memory limit (ulimit -v, cgroup, vm.max_map_count) and register "
               "again",
               "shared memory cannot be mapped: {}, size_bytes={}, error={}", label, size_bytes,
               std::strerror(error));
}

}  // namespace

StatusOr<Mapping> Mapping::Create(ScopedFd fd, uint64_t size_bytes, Access access,
                                  std::string label) {
  struct stat info {};
  if (!fd.valid() || fstat(fd.get(), &info) != 0 || !S_ISREG(info.st_mode)) {
    return Error(StatusCode::kInvalidArgument, reason::kSharedMemory, kLendRemedy,
                 "not a shared-memory object: {}", label);
  }
  const auto object_bytes = static_cast<uint64_t>(info.st_size);
  if (size_bytes == 0 || object_bytes < size_bytes) {
    return Error(StatusCode::kInvalidArgument, reason::kSharedMemory, kLendRemedy,
                 "shared-memory object is smaller than claimed: {}, claimed_bytes={}, "
                 "size_bytes={}",
                 label, size_bytes, object_bytes);
  }
  const bool write = access == Access::kWrite;
  void* data = mmap(nullptr, size_bytes, write ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED,
                    fd.get(), 0);
  if (data == MAP_FAILED) return MapError(label, size_bytes, errno);
  // A sparse object is not filled here: its holes may be larger than the machine.
  if (static_cast<uint64_t>(info.st_blocks) * kStatBlockBytes >= size_bytes) {
    (void)madvise(data, size_bytes, write ? kPopulateWrite : kPopulateRead);
  }
  Mapping mapping;
  mapping.data_ = static_cast<std::byte*>(data);
  mapping.size_bytes_ = size_bytes;
  mapping.access_ = access;
  mapping.label_ = std::move(label);
  mapping.fd_ = std::move(fd);
  mapping.guard_ = sigbus_guard::Add(mapping.data_, RoundToPages(size_bytes));
  if (mapping.guard_ == nullptr) return MapError(mapping.label_, size_bytes, ENOMEM);
  return mapping;
}

Mapping::Mapping(Mapping&& other) noexcept { *this = std::move(other); }

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  if (this == &other) return *this;
  Unmap();
  data_ = std::exchange(other.data_, nullptr);
  size_bytes_ = std::exchange(other.size_bytes_, 0);
  access_ = other.access_;
  fd_ = std::move(other.fd_);
  label_ = std::move(other.label_);
  guard_ = std::exchange(other.guard_, nullptr);
  return *this;
}

Mapping::~Mapping() { Unmap(); }

void Mapping::Unmap() {
  if (data_ == nullptr) return;
  sigbus_guard::Remove(std::exchange(guard_, nullptr));
  munmap(data_, size_bytes_);
  data_ = nullptr;
}

Status Mapping::Truncated(uint64_t now_bytes) const {
  return Error(StatusCode::kUnavailable, reason::kMemoryMoved,
               "register the tensors again; lent memory must keep its size until it is taken back",
               "lent memory was truncated or ran out of /dev/shm: {}, mapped_bytes={}, "
               "size_bytes={}",
               label_, size_bytes_, now_bytes);
}

Status Mapping::CheckIntact() const {
  if (data_ == nullptr) return absl::OkStatus();
  uint64_t now_bytes = size_bytes_;
  if (!CannotShrink(fd_.get())) {
    struct stat info {};
    now_bytes = fstat(fd_.get(), &info) == 0 ? static_cast<uint64_t>(info.st_size) : 0;
  }
  if (now_bytes >= size_bytes_ && !sigbus_guard::Lost(guard_)) return absl::OkStatus();
  return Truncated(now_bytes);
}

Status Mapping::CheckTouched() const {
  return sigbus_guard::Lost(guard_) ? CheckIntact() : absl::OkStatus();
}

Status CheckBlockInside(uint64_t segment_bytes, uint64_t offset_bytes, const Dims& extent,
                        const Dims& strides, uint64_t element_bytes, bool exclusive) {
  const auto refuse = [&](std::string_view what) {
    return Error(StatusCode::kInvalidArgument, reason::kShape,
                 "bind the tensor with the shape and strides that it has in the lent segment",
                 "{}: extent={}, strides={}, offset_bytes={}, element_bytes={}, segment_bytes={}",
                 what, ToString(extent), ToString(strides), offset_bytes, element_bytes,
                 segment_bytes);
  };
  if (extent.size() != strides.size() || element_bytes == 0) return refuse("strides do not fit");
  std::vector<std::pair<int64_t, int64_t>> steps;  // (stride, extent), extent > 1
  bool empty = false;
  for (int d = 0; d < extent.size(); ++d) {
    if (extent[d] < 0 || strides[d] < 0) return refuse("extent or stride is negative");
    empty = empty || extent[d] == 0;
    if (extent[d] > 1) steps.emplace_back(strides[d], extent[d]);
  }
  if (empty) return absl::OkStatus();
  std::sort(steps.begin(), steps.end());
  unsigned __int128 span = 1;  // elements from the first to the last, inclusive
  for (const auto& [stride, count] : steps) {
    if (exclusive && static_cast<unsigned __int128>(stride) < span) {
      return refuse("elements of a parameter share memory");
    }
    span += static_cast<unsigned __int128>(stride) * static_cast<unsigned __int128>(count - 1);
    if (span > segment_bytes) return refuse("block leaves its segment");
  }
  if (offset_bytes > segment_bytes || span * element_bytes > segment_bytes - offset_bytes) {
    return refuse("block leaves its segment");
  }
  return absl::OkStatus();
}

}  // namespace weightd
