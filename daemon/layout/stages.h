// Stages of a rank's parameters: derived ones, which the engine converts, and pulled ones, which
// its client copies to where no worker can write. A stage is received, verified and converted
// before the next one is received, so that the stages may share memory.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/layout/tensor_layout.h"

namespace weightd {

/// Number of stages; 0 if everything is written in place.
uint32_t NumStages(std::span<const ParamInfo> params);

/// The rounds of transfer and verification that it takes: round 0 has what is written in place and
/// stage 1, round r > 0 stage r + 1.
inline uint32_t NumRounds(uint32_t num_stages) { return num_stages > 1 ? num_stages : 1; }
inline uint32_t RoundOf(const ParamInfo& param) { return param.stage > 1 ? param.stage - 1 : 0; }

/// Bytes of the largest stage: what a rank needs beside its parameters if its stages share memory.
uint64_t StagedBytes(std::span<const ParamInfo> params);

/// The parts of a parameter that comes in several stages, each with its stage and its rows (of the
/// outermost dimension); of any other parameter itself.
std::vector<ParamInfo> PartsOf(const ParamInfo& param);

/// The layout with every parameter replaced by its parts, in order, and the writes cut where parts
/// meet. Memory is bound by position in this list. \pre CheckStages(layout.params).ok()
RankLayout SplitStages(RankLayout layout);

/// Stages are numbered from 1 without gaps, only derived and pulled parameters have one, only
/// pulled ones come in parts, and an alias has the stage of the parameter whose storage it shares.
/// \error INVALID_ARGUMENT CONFIG naming the parameter
Status CheckStages(std::span<const ParamInfo> params);

}  // namespace weightd
