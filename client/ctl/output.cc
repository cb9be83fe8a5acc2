#include "client/ctl/output.h"

#include <google/protobuf/util/json_util.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "client/ctl/render.h"
#include "daemon/wire/convert.h"

namespace weightd::ctl {

ExitCode ExitCodeOf(const Status& status) {
  if (status.ok()) return ExitCode::kOk;
  const std::string reason = FieldsOf(status).reason;
  if (reason == reason::kDaemonLost) return ExitCode::kUnreachable;
  return reason == reason::kDeadline ? ExitCode::kTimeout : ExitCode::kFailure;
}

std::string ToJson(const google::protobuf::Message& message, bool lines) {
  google::protobuf::util::JsonPrintOptions options;
  options.add_whitespace = !lines;
  options.always_print_primitive_fields = true;
  options.preserve_proto_field_names = true;
  std::string json;
  const auto converted = google::protobuf::util::MessageToJsonString(message, &json, options);
  WEIGHTD_CHECK(converted.ok());
  if (json.empty() || json.back() != '\n') json += "\n";
  return json;
}

std::string ErrorJson(const Status& status, ExitCode exit_code) {
  const ErrorFields fields = FieldsOf(status);
  const nlohmann::ordered_json json = {{"error",
                                        {{"code", static_cast<int>(status.code())},
                                         {"reason", fields.reason},
                                         {"message", Message(status)},
                                         {"tensor", fields.tensor},
                                         {"rank", fields.rank},
                                         {"phase", fields.phase},
                                         {"peer", fields.peer},
                                         {"remedy", fields.remedy}}},
                                       {"exit_code", static_cast<int>(exit_code)}};
  return json.dump(1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

bool Print(std::string_view text) {
  return std::fwrite(text.data(), 1, text.size(), stdout) == text.size() &&
         std::fflush(stdout) == 0;
}

ExitCode Fail(const Status& status, ExitCode exit_code, Format format) {
  if (format == Format::kJson) {
    Print(ErrorJson(status, exit_code));
  } else {
    std::fputs(("weightctl: " + RenderError(ToProto(status), 2)).c_str(), stderr);
  }
  return exit_code;
}

ExitCode Fail(const Status& status, Format format) {
  return Fail(status, ExitCodeOf(status), format);
}

bool UseColor(const std::string& when) {
  if (when != "auto") return when == "always";
  const char* no_color = std::getenv("NO_COLOR");
  if (no_color != nullptr && *no_color != '\0') return false;
  const char* terminal = std::getenv("TERM");
  if (terminal != nullptr && std::string_view(terminal) == "dumb") return false;
  return isatty(STDOUT_FILENO) == 1;
}

}  // namespace weightd::ctl
