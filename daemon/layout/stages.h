// Stages of a rank's derived parameters. A stage is received, verified and converted before the
// next one is received, so that the stages may share memory.
#pragma once

#include <cstdint>
#include <span>

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

/// Stages are numbered from 1 without gaps, only derived parameters have one, and an alias has that
/// of the parameter whose storage it shares. \error INVALID_ARGUMENT CONFIG naming the parameter
Status CheckStages(std::span<const ParamInfo> params);

}  // namespace weightd
