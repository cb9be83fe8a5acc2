#pragma once

namespace weightd {

/// Rules and plan of a model of DeepSeek-V3's size: 61 layers, 256 experts one by one, 32
/// expert-parallel engine ranks, `sources` FSDP ranks that hold chunks of dimension 0 (`by_rows`)
/// or whole tensors dealt out in turn. Prints figures; returns the process's exit code.
int RunDeepseek(int sources, bool by_rows);

}  // namespace weightd
