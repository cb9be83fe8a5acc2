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

/// A socket to every peer for each lane, in the abstract namespace under the wire's id, which is
/// secret; peers of other users are not let in. A peer that dies is silent, as with NCCL: its
/// messages never end.
class SocketWire final : public Wire {
 public:
  /// Listens. \error UNAVAILABLE WIRE
  static StatusOr<std::unique_ptr<SocketWire>> Create(const std::string& id, uint32_t rank,
                                                      uint32_t size);

  StatusOr<bool> Opened() override;
  StatusOr<bool> Ready(uint32_t) override { return true; }
  Status Start(uint32_t lane, std::span<const WireMessage> group) override;
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
  struct Link {
    ScopedFd fd;
    bool silent = false;  ///< the peer closed the socket, or died
    std::deque<Pending> sends;
    std::deque<Pending> receives;
  };

  SocketWire(std::string id, uint32_t rank, uint32_t size, ScopedFd listener)
      : id_(std::move(id)),
        rank_(rank),
        listener_(std::move(listener)),
        links_(size_t{size} * kWireLanes) {}
  Status AcceptPeers();
  Status Connect(uint32_t link);
  void Pump(Link& link, bool send);
  /// Links are numbered by peer, then lane.
  static uint32_t PeerOf(uint32_t link) { return link / kWireLanes; }
  static uint32_t LinkOf(uint32_t peer, uint32_t lane) { return peer * kWireLanes + lane; }

  const std::string id_;
  const uint32_t rank_;
  ScopedFd listener_;
  std::vector<ScopedFd> strangers_;   ///< accepted, rank and lane not yet said
  std::vector<Link> links_;           ///< those of the own rank stay empty
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
