// What callers of the C ABI read as JSON.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "daemon/base/status.h"
#include "weightd/v1/actor.pb.h"
#include "weightd/v1/types.pb.h"

namespace weightd {

/// {"code","reason","message","tensor","rank","phase","peer","remedy"}; null for OK.
nlohmann::ordered_json ErrorJson(const Status& status);

/// "EPOCH.COUNTER"; "" for no attempt.
std::string AttemptText(const v1::AttemptId& attempt);

/// The result of a sync, as weightd_actor_sync_wait documents it.
nlohmann::ordered_json ResultJson(const v1::SyncResult& result);

/// As text; bytes that are no UTF-8 are replaced.
std::string Dump(const nlohmann::ordered_json& json);

}  // namespace weightd
