// Who this process is, as it tells the daemon.
#pragma once

#include "weightd/v1/types.pb.h"

namespace weightd {

v1::ProcessIdentity ThisProcess();
v1::ProtocolVersion ThisProtocol();

}  // namespace weightd
