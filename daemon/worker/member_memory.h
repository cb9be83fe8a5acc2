// The memory that one client has lent: its segments and where its tensors or parameters lie in
// them. Everything a client claims is checked here.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "daemon/base/scoped_fd.h"
#include "daemon/base/status.h"
#include "daemon/device/segment.h"
#include "daemon/layout/box.h"
#include "daemon/layout/dtype.h"
#include "daemon/transport/transport.h"
#include "weightd/v1/worker.pb.h"

namespace weightd {

/// Most bindings of one member: a million tensors of a few boxes each.
inline constexpr size_t kMaxBindings = 4u << 20;

/// Where one box of a tensor, or one parameter, lies.
struct MemoryBlock {
  uint32_t index = 0;  ///< tensor in the table, or parameter of the rank
  uint32_t box = 0;    ///< which of the tensor's boxes
  Dims extent;
  DType dtype = DType::kUnspecified;
  Binding binding;
};

/// A registration: complete and immutable, so a running step keeps it whatever the client does.
struct MemberMemory {
  std::vector<MemoryBlock> blocks;  ///< ascending by (index, box), each pair once
  std::map<uint32_t, std::shared_ptr<LentSegment>> segments;  ///< shared with later registrations
  std::shared_ptr<const LenderFence> fence;  ///< GPU memory that is read; shared likewise
  uint64_t id = 0;                           ///< of this registration: no other has it
  uint64_t mapped_bytes = 0;
  bool has_staged = false;

  /// The block of (index, box), or nullptr.
  const MemoryBlock* Find(uint32_t index, uint32_t box) const;
  /// OK while all lent objects have the size that they had. Without `sizes` a truncation is found
  /// only once it was touched, which costs no system calls.
  /// \error UNAVAILABLE MEMORY_MOVED naming the lender
  Status CheckIntact(bool sizes) const;
};

/// Builds registrations from the frames of one client.
/// Thread safety: none.
class MemoryRegistration {
 public:
  /// `writable`: an engine rank, whose blocks are written and so may not overlap themselves.
  /// `label` names the client in errors. `mapper` maps for the worker's device and outlives this.
  MemoryRegistration(bool writable, std::string label, SegmentMapper* mapper)
      : writable_(writable), label_(std::move(label)), mapper_(mapper) {}

  /// Maps the offered segments, each once; one that is mapped already is kept.
  /// \error INVALID_ARGUMENT PROTOCOL if descriptors and segments do not match
  /// \error as SegmentMapper
  Status Offer(const v1::OfferSegments& offer, std::vector<ScopedFd> fds);

  /// Checks a page of bindings. With `last` the result is the whole registration; segments that it
  /// does not use are unmapped once no older registration uses them. Without `last`, nullptr. After
  /// an error the pages so far are dropped and an earlier registration stays what it was.
  /// \error INVALID_ARGUMENT SHAPE / DTYPE / MEMORY_MOVED / DUPLICATE_TENSOR naming the position of
  /// the tensor, the sizes and the remedy
  StatusOr<std::shared_ptr<const MemberMemory>> Bind(const v1::BindMemory& page);

  /// Forgets a registration that was refused before its last page.
  void Abandon();

 private:
  StatusOr<SegmentOffer> ReadOffer(const v1::Segment& segment, std::vector<ScopedFd>* fds,
                                   size_t* next_fd) const;
  StatusOr<MemoryBlock> CheckBinding(const v1::MemoryBinding& binding);
  StatusOr<std::shared_ptr<const MemberMemory>> Finish();

  bool writable_;
  std::string label_;
  SegmentMapper* mapper_;
  std::map<uint32_t, std::shared_ptr<LentSegment>> segments_;
  std::shared_ptr<const LenderFence> fence_;
  std::shared_ptr<MemberMemory> pending_;  ///< becomes const and shared when it is whole
};

}  // namespace weightd
