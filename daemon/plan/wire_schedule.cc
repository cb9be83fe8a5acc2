#include "daemon/plan/wire_schedule.h"

#include <algorithm>
#include <map>
#include <optional>

#include "daemon/plan/copy_split.h"

namespace weightd {
namespace {

/// Copies are cut to so many parts of a slot, so that slots are full but for less than one of them.
constexpr uint64_t kPartsPerSlot = 16;

constexpr uint64_t AlignUp(uint64_t bytes) { return (bytes + kWireAlign - 1) & ~(kWireAlign - 1); }

/// A copy on its way: ends by rank on the wire.
struct Parcel {
  uint32_t source = 0;
  uint32_t destination = 0;
  uint32_t target = 0;  ///< engine rank
  Copy copy;
  uint64_t bytes = 0;         ///< landed
  uint64_t staged_bytes = 0;  ///< with the gap after it
};

/// The parcels of one destination in order, one at a time.
class Inbox {
 public:
  Inbox(const WireInput& input, const std::vector<std::string>& devices, uint32_t destination,
        uint64_t most_bytes)
      : input_(input), devices_(devices), destination_(destination), most_bytes_(most_bytes) {
    Advance();
  }

  bool empty() const { return !next_.has_value(); }
  const Parcel& front() const { return *next_; }
  void Pop() { Advance(); }

 private:
  void Advance() {
    next_.reset();
    while (piece_ == pieces_.size()) {
      if (!Refill()) return;
    }
    Parcel parcel = whole_;
    parcel.bytes = pieces_.TargetElements(piece_) * element_bytes_;
    parcel.staged_bytes = AlignUp(parcel.bytes);
    parcel.copy = pieces_[piece_++];
    next_ = parcel;
  }

  /// Cuts the next copy that comes over the wire; false if there is none.
  bool Refill() {
    for (; target_ < input_.plans.size(); ++target_, copy_ = 0) {
      if (input_.target_devices[target_] != devices_[destination_]) continue;
      const CopyList& copies = input_.plans[target_].copies;
      while (copy_ < copies.size()) {
        if (Take(copies[copy_++])) return true;
      }
    }
    return false;
  }

  bool Take(const Copy& copy) {
    const RankLayout& layout = *input_.layouts[target_];
    const Write& write = layout.writes[copy.write];
    if (write.zero_fill) return false;
    const std::string& source = input_.source_devices[copy.source_rank];
    if (!input_.pairs.contains({source, devices_[destination_]})) return false;
    whole_.source = static_cast<uint32_t>(
        std::lower_bound(devices_.begin(), devices_.end(), source) - devices_.begin());
    whole_.destination = destination_;
    whole_.target = target_;
    element_bytes_ = SizeBytes(layout.params[write.param].dtype);
    pieces_ = CopyList();
    piece_ = 0;
    SplitCopy(copy, write, element_bytes_, most_bytes_, pieces_);
    return true;
  }

  const WireInput& input_;
  const std::vector<std::string>& devices_;
  const uint32_t destination_;
  const uint64_t most_bytes_;
  uint32_t target_ = 0;
  size_t copy_ = 0;
  CopyList pieces_;
  size_t piece_ = 0;
  Parcel whole_;  ///< what the pieces have in common
  uint64_t element_bytes_ = 1;
  std::optional<Parcel> next_;
};

/// Gathers the parcels of one turn and notes the own device's part of it.
class Turn {
 public:
  Turn(const std::vector<WireSlots>& slots, WireSchedule& schedule)
      : slots_(slots), schedule_(schedule), sent_(slots.size()), received_(slots.size()) {}

  /// False if a slot is too full for it.
  bool Add(const Parcel& parcel) {
    uint64_t& sent = sent_[parcel.source];
    uint64_t& received = received_[parcel.destination];
    if (sent + parcel.staged_bytes > slots_[parcel.source].send_bytes ||
        received + parcel.staged_bytes > slots_[parcel.destination].receive_bytes) {
      return false;
    }
    sent += parcel.staged_bytes;
    received += parcel.staged_bytes;
    if (parcel.source == schedule_.rank) out_[parcel.destination].push_back(parcel);
    if (parcel.destination == schedule_.rank) in_[parcel.source].push_back(parcel);
    return true;
  }

  void Close() {
    Note(out_, schedule_.sends);
    Note(in_, schedule_.receives);
    ++schedule_.num_turns;
  }

 private:
  using ByPeer = std::map<uint32_t, std::vector<Parcel>>;

  static void Note(const ByPeer& parts, WireSide& side) {
    uint64_t offset = 0, landed = 0;
    for (const auto& [peer, parcels] : parts) {
      WireOp op{peer, offset, 0};
      for (const Parcel& parcel : parcels) {
        side.copies.push_back(parcel.copy);
        side.targets.push_back(parcel.target);
        side.offsets.push_back(offset);
        offset += parcel.staged_bytes;
        landed += parcel.bytes;
      }
      op.bytes = offset - op.offset;
      side.ops.push_back(op);
    }
    side.copy_end.push_back(static_cast<uint32_t>(side.copies.size()));
    side.op_end.push_back(static_cast<uint32_t>(side.ops.size()));
    side.bytes.push_back(landed);
  }

  const std::vector<WireSlots>& slots_;
  WireSchedule& schedule_;
  std::vector<uint64_t> sent_;  ///< by rank on the wire
  std::vector<uint64_t> received_;
  ByPeer out_;
  ByPeer in_;
};

/// The largest parcel that every slot holds several of.
uint64_t PartBytes(const std::vector<WireSlots>& slots) {
  uint64_t least = UINT64_MAX;
  for (const WireSlots& slot : slots) {
    if (slot.send_bytes > 0) least = std::min(least, slot.send_bytes);
    if (slot.receive_bytes > 0) least = std::min(least, slot.receive_bytes);
  }
  return least / kPartsPerSlot / kWireAlign * kWireAlign;
}

}  // namespace

WireSlots SlotsOf(const WirePairs& pairs, const std::string& device, uint64_t wire_bytes) {
  const auto names = [&](const auto& end) {
    return std::any_of(pairs.begin(), pairs.end(),
                       [&](const auto& pair) { return end(pair) == device; });
  };
  const bool sends = names([](const auto& pair) { return pair.first; });
  const bool receives = names([](const auto& pair) { return pair.second; });
  const uint64_t rings = (sends ? 1 : 0) + (receives ? 1 : 0);
  if (rings == 0) return {};
  const uint64_t slot = wire_bytes / rings / kWireSlots / kWireAlign * kWireAlign;
  return {sends ? slot : 0, receives ? slot : 0};
}

std::vector<std::string> WireDevices(const WirePairs& pairs) {
  std::set<std::string> devices;
  for (const auto& [source, target] : pairs) devices.insert({source, target});
  return {devices.begin(), devices.end()};
}

WireSchedule ScheduleWire(const WireInput& input, const std::string& device) {
  WireSchedule schedule;
  schedule.devices = WireDevices(input.pairs);
  const auto& devices = schedule.devices;
  const auto own = std::lower_bound(devices.begin(), devices.end(), device);
  if (own == devices.end() || *own != device) return WireSchedule();
  WEIGHTD_CHECK(input.wire_bytes >= kMinWireBytes);
  schedule.rank = static_cast<uint32_t>(own - devices.begin());
  std::vector<WireSlots> slots;
  slots.reserve(devices.size());
  for (const std::string& each : devices) {
    slots.push_back(SlotsOf(input.pairs, each, input.wire_bytes));
  }
  schedule.slots = slots[schedule.rank];
  const auto rank_of = [&](const std::string& name) {
    return static_cast<uint32_t>(std::lower_bound(devices.begin(), devices.end(), name) -
                                 devices.begin());
  };
  for (const auto& [source, target] : input.pairs) {
    schedule.links.emplace_back(rank_of(source), rank_of(target));
  }
  std::vector<Inbox> inboxes;
  for (uint32_t rank = 0; rank < devices.size(); ++rank) {
    if (slots[rank].receive_bytes > 0) {
      inboxes.emplace_back(input, devices, rank, PartBytes(slots));
    }
  }
  const auto left = [](const Inbox& inbox) { return !inbox.empty(); };
  while (std::any_of(inboxes.begin(), inboxes.end(), left)) {
    Turn turn(slots, schedule);
    std::vector<bool> full(inboxes.size());
    for (bool moved = true; moved;) {
      moved = false;
      for (size_t i = 0; i < inboxes.size(); ++i) {
        if (full[i] || inboxes[i].empty()) continue;
        full[i] = !turn.Add(inboxes[i].front());
        if (full[i]) continue;
        inboxes[i].Pop();
        moved = true;
      }
    }
    turn.Close();
  }
  return schedule;
}

}  // namespace weightd
