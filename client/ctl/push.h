// `weightctl push DIR`: a Hugging Face checkpoint directory into the registered engines. weightctl
// is then an actor of one rank whose shards are mapped files; everything else is a sync like any
// other.
#pragma once

#include "client/ctl/commands.h"
#include "client/ctl/exit_code.h"
#include "client/ctl/push_target.h"

namespace weightd::ctl {

/// Checks the directory, then asks the daemon, then syncs. Ctrl-C cancels the sync; a second one
/// ends the process.
ExitCode RunPush(const GlobalOptions& global, const PushOptions& push);

}  // namespace weightd::ctl
