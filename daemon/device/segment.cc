#include "daemon/device/segment.h"

#include <sys/stat.h>
#include <sys/types.h>

#include <utility>

#include "daemon/device/mapping.h"

namespace weightd {
namespace {

/// A shared memory object, mapped, and which object it is.
class HostSegment final : public LentSegment {
 public:
  HostSegment(Mapping mapping, dev_t device, ino_t inode)
      : mapping_(std::move(mapping)), device_(device), inode_(inode) {}

  std::byte* data() const override { return mapping_.data(); }
  uint64_t size_bytes() const override { return mapping_.size_bytes(); }
  Status CheckIntact(bool sizes) const override {
    return sizes ? mapping_.CheckIntact() : mapping_.CheckTouched();
  }
  bool Is(dev_t device, ino_t inode) const { return device_ == device && inode_ == inode; }

 private:
  const Mapping mapping_;
  const dev_t device_;
  const ino_t inode_;
};

}  // namespace

StatusOr<std::shared_ptr<LentSegment>> HostSegmentMapper::Map(SegmentOffer offer,
                                                              std::shared_ptr<LentSegment> held) {
  if (offer.kind != SegmentOffer::Kind::kSharedMemory) {
    return Error(StatusCode::kInvalidArgument, reason::kDevice,
                 "register the rank again: its memory belongs to the worker of its GPU",
                 "worker of host memory was offered GPU memory: {}", offer.label);
  }
  if (offer.fds.size() != 1) {
    return Error(
        StatusCode::kInvalidArgument, reason::kProtocol, "use the client library of this release",
        "segment carries {} descriptors instead of one: {}", offer.fds.size(), offer.label);
  }
  struct stat info {};
  const bool known_object = ::fstat(offer.fds[0].get(), &info) == 0;
  const auto* same = dynamic_cast<const HostSegment*>(held.get());
  if (known_object && same != nullptr && same->Is(info.st_dev, info.st_ino) &&
      same->size_bytes() == offer.size_bytes && same->CheckIntact(true).ok()) {
    return held;
  }
  WEIGHTD_ASSIGN_OR_RETURN(
      Mapping mapping,
      Mapping::Create(std::move(offer.fds[0]), offer.size_bytes,
                      offer.writable ? Mapping::Access::kWrite : Mapping::Access::kRead,
                      std::move(offer.label)));
  // Shared by registrations and running steps.
  return std::make_shared<HostSegment>(std::move(mapping), info.st_dev, info.st_ino);
}

StatusOr<std::shared_ptr<const LenderFence>> HostSegmentMapper::OpenFence(
    const std::string& handle, const std::string& label) {
  return Error(StatusCode::kInvalidArgument, reason::kProtocol,
               "use the client library of this release",
               "worker of host memory was offered a GPU event: {} bytes={}", label, handle.size());
}

}  // namespace weightd
