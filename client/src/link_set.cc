#include "client/src/link_set.h"

#include <algorithm>
#include <utility>

namespace weightd {

void LinkSet::Aim(const v1::WorkerEndpoint& endpoint) {
  Entry& entry = entries_[endpoint.device()];
  entry.aim.reset();
  if (!endpoint.socket_path().empty()) entry.aim = endpoint;
}

void LinkSet::Advance(const OfferFn& offer) {
  std::shared_ptr<const MemoryOffer> shared;  // by all links that start now
  for (auto& [device, entry] : entries_) {
    if (!entry.aim.has_value()) continue;
    End(entry);
    if (entry.link != nullptr) continue;  // goes on when the worker has let go
    if (shared == nullptr) shared = offer();
    Start(device, entry, shared);
  }
}

void LinkSet::Start(const std::string& device, Entry& entry,
                    std::shared_ptr<const MemoryOffer> offer) {
  const uint64_t id = entry.id = next_id_++;
  entry.finishing = entry.ready = entry.lost = false;
  DataLink::Callbacks callbacks;
  callbacks.on_ready = [this, device, id](Status status) {
    callbacks_.post(
        [this, device, id, status = std::move(status)] { OnReady(device, id, status); });
  };
  callbacks.on_end = [this, device, id] {
    callbacks_.post([this, device, id] { OnEnd(device, id); });
  };
  entry.link = std::make_unique<DataLink>(*std::exchange(entry.aim, std::nullopt), std::move(offer),
                                          std::move(callbacks));
}

void LinkSet::End(Entry& entry) {
  if (entry.link == nullptr) return;
  entry.ready = false;
  if (!fenced_) {
    entry.link.reset();
  } else if (!std::exchange(entry.finishing, true)) {
    entry.link->Finish();
  }
}

void LinkSet::LetGo() {
  for (auto& [device, entry] : entries_) {
    entry.aim.reset();
    End(entry);
  }
  if (empty()) entries_.clear();
}

void LinkSet::Finish() {
  for (auto& [device, entry] : entries_) {
    entry.aim.reset();
    if (entry.link != nullptr) entry.link->Finish();
  }
}

bool LinkSet::empty() const {
  return std::all_of(entries_.begin(), entries_.end(),
                     [](const auto& item) { return item.second.link == nullptr; });
}

bool LinkSet::complete() const {
  const auto own = entries_.find(own_);
  if (own == entries_.end() || !own->second.ready) return false;
  return std::all_of(entries_.begin(), entries_.end(), [](const auto& item) {
    const Entry& entry = item.second;
    return entry.ready || (entry.link == nullptr && !entry.aim.has_value() && !entry.lost);
  });
}

LinkSet::Entry* LinkSet::Find(const std::string& device, uint64_t id) {
  const auto it = entries_.find(device);
  if (it == entries_.end() || it->second.link == nullptr || it->second.id != id) return nullptr;
  return &it->second;
}

void LinkSet::OnReady(const std::string& device, uint64_t id, Status status) {
  Entry* entry = Find(device, id);
  if (entry == nullptr || entry->finishing) return;
  entry->ready = status.ok();
  callbacks_.on_ready(device, std::move(status));
}

void LinkSet::OnEnd(const std::string& device, uint64_t id) {
  Entry* entry = Find(device, id);
  if (entry == nullptr) return;
  const bool lost = entry->lost = std::exchange(entry->ready, false);
  entry->link.reset();
  entry->finishing = false;
  callbacks_.on_end(device, lost);
}

}  // namespace weightd
