// Where results and errors of a command go: text for people, or one JSON document for programs.
#pragma once

#include <google/protobuf/message.h>

#include <string>
#include <string_view>

#include "client/ctl/exit_code.h"
#include "client/ctl/table.h"
#include "daemon/base/status.h"

namespace weightd::ctl {

enum class Format { kTable, kWide, kJson };

/// JSON of a message: proto field names, every field present, 64-bit integers as strings (proto3's
/// mapping). `lines` writes it on one line.
std::string ToJson(const google::protobuf::Message& message, bool lines);

/// {"error": {"code", "reason", "message", "tensor", ...}, "exit_code": N}
std::string ErrorJson(const Status& status, ExitCode exit_code);

/// Prints to standard output. False when nobody reads it any more.
bool Print(std::string_view text);

/// Prints an error: as JSON on standard output in format json, else as text on standard error.
/// Returns its exit code.
ExitCode Fail(const Status& status, Format format);
/// The same with a given exit code.
ExitCode Fail(const Status& status, ExitCode exit_code, Format format);

/// Whether to use colours: `when` is "auto", "always" or "never"; auto means a terminal that is not
/// dumb and no NO_COLOR.
bool UseColor(const std::string& when);

}  // namespace weightd::ctl
