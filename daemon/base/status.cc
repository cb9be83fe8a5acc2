#include "daemon/base/status.h"

#include <cstdio>
#include <cstdlib>

namespace weightd {
namespace {

constexpr char kPrefix[] = "weightd/";

struct Field {
  const char* name;
  std::string ErrorFields::*member;
};

constexpr Field kFields[] = {
    {"reason", &ErrorFields::reason}, {"tensor", &ErrorFields::tensor},
    {"rank", &ErrorFields::rank},     {"phase", &ErrorFields::phase},
    {"peer", &ErrorFields::peer},     {"remedy", &ErrorFields::remedy},
};

std::string Key(const Field& field) { return std::string(kPrefix) + field.name; }

}  // namespace

Status MakeError(StatusCode code, std::string_view message, const ErrorFields& fields) {
  return WithFields(Status(code, std::string(message)), fields);
}

ErrorFields FieldsOf(const Status& status) {
  ErrorFields fields;
  for (const Field& field : kFields) {
    if (auto payload = status.GetPayload(Key(field))) {
      fields.*field.member = std::string(*payload);
    }
  }
  if (!status.ok() && fields.reason.empty()) fields.reason = reason::kInternal;
  return fields;
}

std::string Message(const Status& status) { return std::string(status.message()); }

Status WithFields(Status status, const ErrorFields& fields) {
  if (status.ok()) return status;
  for (const Field& field : kFields) {
    const std::string& value = fields.*field.member;
    if (value.empty() || status.GetPayload(Key(field)).has_value()) continue;
    status.SetPayload(Key(field), absl::Cord(value));
  }
  return status;
}

Status WithTensor(Status status, std::string_view tensor) {
  return WithFields(std::move(status), {.tensor = std::string(tensor)});
}
Status WithRank(Status status, std::string_view rank) {
  return WithFields(std::move(status), {.rank = std::string(rank)});
}
Status WithPhase(Status status, std::string_view phase) {
  return WithFields(std::move(status), {.phase = std::string(phase)});
}
Status MovedToPhase(Status status, std::string_view phase) {
  for (const Field& field : kFields) {
    if (field.member == &ErrorFields::phase) status.ErasePayload(Key(field));
  }
  return WithPhase(std::move(status), phase);
}
Status WithPeer(Status status, std::string_view peer) {
  return WithFields(std::move(status), {.peer = std::string(peer)});
}

void CheckFailed(const char* condition, const char* file, int line) {
  std::fprintf(stderr, "weightd: broken invariant: %s (%s:%d)\n", condition, file, line);
  std::abort();
}

}  // namespace weightd
