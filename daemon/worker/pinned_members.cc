#include <algorithm>

#include "daemon/worker/member_table.h"

namespace weightd {
namespace {

Status MemberGone(const std::string& who) {
  return WithPeer(Error(StatusCode::kUnavailable, reason::kPeerLost,
                        "sync again once its process is back and has registered",
                        "memory of a member is gone: member={}", who),
                  who);
}

}  // namespace

PinnedMembers::~PinnedMembers() {
  if (table_ != nullptr) table_->Unpin(this);
}

const PinnedMembers::Entry* PinnedMembers::Find(uint64_t member) const {
  const auto it = entries_.find(member);
  return it == entries_.end() ? nullptr : &it->second;
}

Status PinnedMembers::lost() const {
  if (table_ == nullptr) return absl::OkStatus();
  const std::lock_guard lock(table_->mutex_);
  return lost_label_.empty() ? absl::OkStatus() : MemberGone(lost_label_);
}

Status MemberTable::Pin(std::span<const uint64_t> members, std::atomic<bool>* cancel,
                        PinnedMembers* pinned) {
  const std::lock_guard lock(mutex_);
  std::map<uint64_t, PinnedMembers::Entry> entries;
  for (uint64_t id : members) {
    const auto live = live_.find(id);
    if (live == live_.end()) {
      const auto expected = expected_.find(id);
      return MemberGone(expected == expected_.end() ? fmt::format("member {}", id)
                                                    : expected->second.identity.label);
    }
    std::shared_ptr<const MemberMemory> memory = live->second->memory();
    if (memory == nullptr) return MemberGone(live->second->label());
    entries[id] = {.member = live->second, .memory = std::move(memory)};
  }
  for (const auto& [id, entry] : entries) ++pins_[id];
  pinned->table_ = this;
  pinned->cancel_ = cancel;
  pinned->entries_ = std::move(entries);
  pinned_.push_back(pinned);
  return absl::OkStatus();
}

void MemberTable::Unpin(PinnedMembers* pinned) {
  {
    const std::lock_guard lock(mutex_);
    std::erase(pinned_, pinned);
  }
  std::vector<uint64_t> ids;
  for (const auto& [id, entry] : pinned->entries_) ids.push_back(id);
  pinned->entries_.clear();  // the last user of a replaced registration unmaps it here
  {
    const std::lock_guard lock(mutex_);
    for (uint64_t id : ids) {
      if (--pins_[id] == 0) pins_.erase(id);
    }
  }
  Wake();
}

}  // namespace weightd
