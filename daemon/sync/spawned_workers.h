// Workers that clients start: who is asked for which device. Knows no process and no lock.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "daemon/sync/ports.h"

namespace weightd {

/// For each device that the daemon does not serve itself: one of the clients that offered to is its
/// owner and is asked to start the worker. When the owner has ended, and its worker with it, the
/// next is asked. Thread safety: none; the coordinator locks.
class SpawnedWorkers {
 public:
  /// What is known of one worker.
  struct View {
    std::string device;
    std::string owner;  ///< label of the client; empty: it has ended, its worker not yet
    uint32_t pid = 0;   ///< as the worker says
    bool attached = false;
    uint32_t restarts = 0;
    std::string last_exit;
  };

  /// `on_restart(device)` tells that a worker died and its owner starts it again.
  SpawnedWorkers(WorkerSettings settings, std::function<void(const std::string&)> on_restart)
      : settings_(std::move(settings)), on_restart_(std::move(on_restart)) {}

  /// The client's memory is on this device now, and on no other. It is asked to start the worker
  /// if nobody else has been; one that had given up may be asked again.
  void Offer(const std::shared_ptr<OwnerPort>& client, const std::string& label,
             const std::string& device);
  /// The client has ended. Its worker follows; then another client is asked.
  void Withdraw(const OwnerPort* client);
  /// The client's worker has ended: `why`. One that gives up is not asked again.
  void Ended(const OwnerPort* client, const std::string& device, const std::string& why,
             bool given_up);

  /// The owner of this device's worker if the token is the one that it was given; else nullptr.
  std::shared_ptr<OwnerPort> Owner(const std::string& device, const std::string& token) const;
  /// A worker with the owner's token has attached.
  void Up(const std::string& device, uint32_t pid);
  /// Its connection has ended. Does nothing for a device of the daemon's own.
  void Down(const std::string& device);

  /// Somebody has been asked to start the device's worker.
  bool Serves(const std::string& device) const;
  std::vector<View> Views() const;

 private:
  struct Candidate {
    std::shared_ptr<OwnerPort> client;  // shared with its stream
    std::string label;
    bool given_up = false;
  };
  struct Worker {
    std::vector<Candidate> candidates;  // in the order of their offers
    const OwnerPort* owner = nullptr;   // one of them
    std::string token;                  // of the owner
    View view;
  };
  void Ask(const std::string& device, Worker& worker);
  void Remove(const OwnerPort* client, const std::string& but_from);
  static Candidate* Find(Worker& worker, const OwnerPort* client);

  const WorkerSettings settings_;
  const std::function<void(const std::string&)> on_restart_;
  std::map<std::string, Worker> workers_;  // by device
};

}  // namespace weightd
