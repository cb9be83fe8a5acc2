#pragma once

#include <vector>

#include "daemon/sync/ports.h"
#include "weightd/v1/worker.pb.h"

namespace weightd {

/// Cuts a plan into pages of about kPageBytes, in the order that the worker assembles: tensors,
/// sources, shards per actor rank, parameters and writes per engine rank. The last page carries
/// digest and limits.
std::vector<v1::PlanPage> PlanPages(const WorkerPlan& plan);

}  // namespace weightd
