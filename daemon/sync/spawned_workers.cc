#include "daemon/sync/spawned_workers.h"

#include <algorithm>
#include <utility>

#include "daemon/base/log.h"
#include "daemon/base/worker_command.h"

namespace weightd {

SpawnedWorkers::Candidate* SpawnedWorkers::Find(Worker& worker, const OwnerPort* client) {
  const auto it =
      std::find_if(worker.candidates.begin(), worker.candidates.end(),
                   [&](const Candidate& candidate) { return candidate.client.get() == client; });
  return it == worker.candidates.end() ? nullptr : &*it;
}

void SpawnedWorkers::Offer(const std::shared_ptr<OwnerPort>& client, const std::string& label,
                           const std::string& device) {
  Remove(client.get(), device);
  Worker& worker = workers_[device];
  worker.view.device = device;
  Candidate* known = Find(worker, client.get());
  if (known == nullptr) {
    worker.candidates.push_back({client, label});
  } else {
    known->given_up = false;
  }
  Ask(device, worker);
}

/// Chooses an owner unless there is one, or the worker of an earlier one has not ended yet.
void SpawnedWorkers::Ask(const std::string& device, Worker& worker) {
  if (worker.owner != nullptr || worker.view.attached) return;
  const auto next = std::find_if(worker.candidates.begin(), worker.candidates.end(),
                                 [](const Candidate& candidate) { return !candidate.given_up; });
  if (next == worker.candidates.end()) return;
  worker.owner = next->client.get();
  worker.token = RandomToken();
  worker.view.owner = next->label;
  spdlog::info("a client is asked to start the worker: device={} client={}", device, next->label);
  next->client->SendStartWorker({device, worker.token, settings_});
}

void SpawnedWorkers::Withdraw(const OwnerPort* client) { Remove(client, ""); }

void SpawnedWorkers::Remove(const OwnerPort* client, const std::string& but_from) {
  for (auto it = workers_.begin(); it != workers_.end();) {
    auto& [device, worker] = *it;
    const Candidate* candidate = Find(worker, client);
    if (device != but_from && candidate != nullptr) {
      if (worker.owner == client) {
        candidate->client->SendStopWorker(device, false, "its owner uses another device");
        worker.owner = nullptr;
        worker.token.clear();
        worker.view.owner.clear();
      }
      std::erase_if(worker.candidates,
                    [&](const Candidate& c) { return c.client.get() == client; });
      Ask(device, worker);
    }
    const bool over = worker.candidates.empty() && !worker.view.attached;
    it = over ? workers_.erase(it) : std::next(it);
  }
}

void SpawnedWorkers::Ended(const OwnerPort* client, const std::string& device,
                           const std::string& why, bool given_up) {
  constexpr size_t kLongest = 200;  // a client's word, kept and shown
  const std::string how = why.substr(0, kLongest);
  const auto it = workers_.find(device);
  if (it == workers_.end() || it->second.owner != client) return;
  Worker& worker = it->second;
  worker.view.last_exit = how;
  if (!given_up) {
    spdlog::error("worker died and its owner starts it again: device={} owner={} cause={}", device,
                  worker.view.owner, how);
    ++worker.view.restarts;
    return on_restart_(device);
  }
  spdlog::error("the client cannot start the worker: device={} client={} cause={}", device,
                worker.view.owner, how);
  Find(worker, client)->given_up = true;
  worker.owner = nullptr;
  worker.token.clear();
  worker.view.owner.clear();
  Ask(device, worker);
}

std::shared_ptr<OwnerPort> SpawnedWorkers::Owner(const std::string& device,
                                                 const std::string& token) const {
  const auto it = workers_.find(device);
  if (it == workers_.end() || it->second.owner == nullptr || token != it->second.token) {
    return nullptr;
  }
  for (const Candidate& candidate : it->second.candidates) {
    if (candidate.client.get() == it->second.owner) return candidate.client;
  }
  return nullptr;
}

void SpawnedWorkers::Up(const std::string& device, uint32_t pid) {
  const auto it = workers_.find(device);
  if (it == workers_.end()) return;
  it->second.view.attached = true;
  it->second.view.pid = pid;
}

void SpawnedWorkers::Down(const std::string& device) {
  const auto it = workers_.find(device);
  if (it == workers_.end()) return;
  it->second.view.attached = false;
  it->second.view.pid = 0;
  if (it->second.owner == nullptr) Ask(device, it->second);
  if (it->second.candidates.empty()) workers_.erase(it);
}

bool SpawnedWorkers::Serves(const std::string& device) const {
  const auto it = workers_.find(device);
  return it != workers_.end() && it->second.owner != nullptr;
}

std::vector<SpawnedWorkers::View> SpawnedWorkers::Views() const {
  std::vector<View> views;
  for (const auto& [device, worker] : workers_) {
    if (worker.owner != nullptr || worker.view.attached) views.push_back(worker.view);
  }
  return views;
}

}  // namespace weightd
