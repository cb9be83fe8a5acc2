// What the files of `plan export --case` and `loader check --trace` have in common: JSON, or gzip
// of it, with sources and ranks.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "daemon/base/status.h"
#include "daemon/layout/tensor_layout.h"

namespace weightd {

// Keys keep their order: output is compared with input by eye.
using Json = nlohmann::ordered_json;

/// INVALID_ARGUMENT CONFIG for file `origin`.
template <typename... Args>
Status NotACase(const std::string& origin, fmt::format_string<Args...> format, Args&&... args) {
  return Error(StatusCode::kInvalidArgument, reason::kConfig,
               "give a file in the format that loaders/README.md describes", "{}: {}", origin,
               fmt::format(format, std::forward<Args>(args)...));
}

/// The text of a plain or gzip file. \error NOT_FOUND, INVALID_ARGUMENT for a damaged or huge one
StatusOr<std::string> ReadCase(const std::string& path);

/// A small non-negative integer field, or `fallback` where it is absent.
StatusOr<int> CaseNumber(const Json& object, const char* key, int fallback,
                         const std::string& origin);

/// A text field; `fallback` where it is absent, an error there if `fallback` is nullptr.
StatusOr<std::string> CaseText(const Json& object, const char* key, const char* fallback,
                               const std::string& origin);

/// The field `source`: a list of [name, shape], as float32 tensors.
StatusOr<TensorTable> CaseSources(const Json& root, const std::string& origin);

/// tp_size, tp_rank, ep_size, ep_rank, pp_size and pp_rank of a rank; absent ones are 1 and 0.
StatusOr<EngineCoordinates> CaseCoordinates(const Json& rank, const std::string& origin);

}  // namespace weightd
