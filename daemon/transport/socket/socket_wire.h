// The stand-in for NCCL between workers of host memory: contiguous bytes over unix sockets.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/scoped_fd.h"
#include "daemon/transport/wire/wire.h"

namespace weightd {

/// A socket to every peer, in the abstract namespace under the wire's id, which is secret; peers of
/// other users are not let in. A peer that dies is silent, as with NCCL: its messages never end.
class SocketWire final : public Wire {
 public:
  /// Listens. \error UNAVAILABLE WIRE
  static StatusOr<std::unique_ptr<SocketWire>> Create(const std::string& id, uint32_t rank,
                                                      uint32_t size);

  StatusOr<bool> Opened() override;
  StatusOr<bool> Ready() override { return true; }
  Status Start(std::span<const WireMessage> group) override;
  StatusOr<uint64_t> Ended() override;
  void Abort() override;
  void AwaitNews(microseconds limit) override;

 private:
  /// A message that has not ended.
  struct Pending {
    std::byte* data;
    uint64_t bytes;
    uint64_t group;
  };
  struct Peer {
    ScopedFd fd;
    bool silent = false;  ///< it closed the socket, or died
    std::deque<Pending> sends;
    std::deque<Pending> receives;
  };

  SocketWire(std::string id, uint32_t rank, uint32_t size, ScopedFd listener)
      : id_(std::move(id)), rank_(rank), listener_(std::move(listener)), peers_(size) {}
  Status AcceptPeers();
  Status Connect(uint32_t peer);
  void Pump(Peer& peer, bool send);

  const std::string id_;
  const uint32_t rank_;
  ScopedFd listener_;
  std::vector<ScopedFd> strangers_;   ///< accepted, rank not yet said
  std::vector<Peer> peers_;           ///< by rank; the own one stays empty
  std::deque<uint32_t> open_groups_;  ///< messages left of each, the oldest first
  uint64_t ended_ = 0;
};

class SocketWireMaker final : public WireMaker {
 public:
  std::string_view name() const override { return "socket"; }
  StatusOr<std::string> MakeId() override;
  StatusOr<std::unique_ptr<Wire>> Open(const std::string& id, uint32_t rank,
                                       uint32_t size) override;
};

}  // namespace weightd
