// The answers of AdminService as text for people. Pure: message in, text out.
#pragma once

#include <string>

#include "client/ctl/table.h"
#include "weightd/v1/admin.pb.h"

namespace weightd::ctl {

/// Daemon, workers and, per model, trainers, the running sync, replicas and the last result.
std::string RenderStatus(const v1::GetStatusResponse& status, const TextStyle& style);

/// One line per replica of every model.
std::string RenderEngines(const v1::GetStatusResponse& status, const TextStyle& style);

/// Per model the version of every replica, then past syncs, latest first.
std::string RenderVersions(const v1::GetStatusResponse& status, const TextStyle& style);

/// Totals, bytes per pair with path and reason, boxes per tensor. `with_boxes` (or a wide style)
/// lists every box.
std::string RenderPlan(const v1::GetPlanResponse& plan, bool with_boxes, const TextStyle& style);

/// "message (tensor, rank, phase, peer)"; the remedy follows on a line of its own if there is one.
/// Lines after the first start with `indent` spaces.
std::string RenderError(const v1::ErrorDetail& error, int indent);

}  // namespace weightd::ctl
