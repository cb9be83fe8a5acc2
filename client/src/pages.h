// Registrations as messages, cut into pages of less than 1 MiB.
#pragma once

#include <string>
#include <vector>

#include "client/src/registration.h"
#include "daemon/wire/data_channel.h"
#include "weightd/v1/actor.pb.h"
#include "weightd/v1/engine.pb.h"
#include "weightd/v1/worker.pb.h"

namespace weightd {

/// What the rank holds. At least one page; the last has `last` set. Boxes come before or with the
/// first page that refers to them.
std::vector<v1::ShardsPage> ShardsPages(const RankShards& shards);

/// The tensor table. At least one page; the last has `last` set.
std::vector<v1::TensorTablePage> TablePages(const TensorTable& table);

std::vector<v1::ParamsPage> ParamsPages(const std::vector<ParamInfo>& params);

/// Sources, then writes.
std::vector<v1::TracePage> TracePages(const TracedLayout& trace);

/// Where the shards of an actor lie: one binding per non-empty box.
std::vector<v1::BindMemory> ActorBindings(const ActorRegistration& registration);

/// Where the parameters of an engine lie: one binding per parameter that is lent, or per part of
/// it.
std::vector<v1::BindMemory> EngineBindings(const EngineRegistration& registration);

/// The lent memory, in frames of at most kMaxFrameFds descriptors, each with its own. `event` goes
/// with the first; see OfferSegments.
struct SegmentFrame {
  v1::OfferSegments offer;
  std::vector<int> fds;  ///< belong to the SegmentSet
};
std::vector<SegmentFrame> SegmentFrames(const SegmentSet& segments, const std::string& event = "");

}  // namespace weightd
