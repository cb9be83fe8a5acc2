#include "client/ctl/pure/case_json.h"

#include <zlib.h>

namespace weightd {
namespace {

// Largest case file, unpacked.
constexpr size_t kMaxCaseBytes = size_t{1} << 30;

}  // namespace

StatusOr<std::string> ReadCase(const std::string& path) {
  const gzFile file = gzopen(path.c_str(), "rb");
  if (file == nullptr) {
    return Error(StatusCode::kNotFound, reason::kConfig, "check the path", "cannot open case: {}",
                 path);
  }
  std::string text;
  std::string chunk(1 << 20, '\0');
  int count = 0;
  while ((count = gzread(file, chunk.data(), static_cast<unsigned>(chunk.size()))) > 0) {
    text.append(chunk, 0, static_cast<size_t>(count));
    if (text.size() > kMaxCaseBytes) break;
  }
  const bool complete = count == 0 && gzclose_r(file) == Z_OK;
  if (complete) return text;
  if (count != 0) gzclose_r(file);
  return NotACase(path, "{}",
                  text.size() > kMaxCaseBytes
                      ? "case too large: more than 1 GiB unpacked"
                      : "the file ends early or its compression is damaged");
}

StatusOr<int> CaseNumber(const Json& object, const char* key, int fallback,
                         const std::string& origin) {
  const auto found = object.find(key);
  if (found == object.end()) return fallback;
  if (found->is_number_unsigned() && found->get<uint64_t>() < (1u << 30)) {
    return static_cast<int>(found->get<uint64_t>());
  }
  return NotACase(origin, "'{}' is not a small non-negative integer: {}", key, found->dump());
}

StatusOr<std::string> CaseText(const Json& object, const char* key, const char* fallback,
                               const std::string& origin) {
  const auto found = object.find(key);
  if (found == object.end() && fallback != nullptr) return std::string(fallback);
  if (found != object.end() && found->is_string()) return found->get<std::string>();
  return NotACase(origin, "'{}' is missing or not a string", key);
}

StatusOr<TensorTable> CaseSources(const Json& root, const std::string& origin) {
  const auto list = root.find("source");
  if (list == root.end() || !list->is_array()) {
    return NotACase(origin, "'source' is missing or not a list of [name, shape]");
  }
  TensorTable table;
  for (const Json& entry : *list) {
    const bool pair = entry.is_array() && entry.size() == 2 && entry[0].is_string() &&
                      entry[1].is_array() && entry[1].size() <= kMaxDims;
    if (!pair) return NotACase(origin, "source {} is not [name, shape]", table.size());
    TensorInfo tensor{.name = entry[0].get<std::string>(), .dtype = DType::kFloat32};
    for (const Json& extent : entry[1]) {
      tensor.shape.push_back(extent.is_number_integer() ? extent.get<int64_t>() : -1);
    }
    if (!ValidShape({tensor.shape.begin(), tensor.shape.end()})) {
      return NotACase(origin, "source {} has no valid shape: {}", tensor.name, entry[1].dump());
    }
    table.push_back(std::move(tensor));
  }
  return table;
}

StatusOr<EngineCoordinates> CaseCoordinates(const Json& rank, const std::string& origin) {
  if (!rank.is_object()) return NotACase(origin, "a rank is not an object: {}", rank.dump());
  EngineCoordinates at;
  WEIGHTD_ASSIGN_OR_RETURN(at.tp_size, CaseNumber(rank, "tp_size", 1, origin));
  WEIGHTD_ASSIGN_OR_RETURN(at.tp_rank, CaseNumber(rank, "tp_rank", 0, origin));
  WEIGHTD_ASSIGN_OR_RETURN(at.ep_size, CaseNumber(rank, "ep_size", 1, origin));
  WEIGHTD_ASSIGN_OR_RETURN(at.ep_rank, CaseNumber(rank, "ep_rank", 0, origin));
  WEIGHTD_ASSIGN_OR_RETURN(at.pp_size, CaseNumber(rank, "pp_size", 1, origin));
  WEIGHTD_ASSIGN_OR_RETURN(at.pp_rank, CaseNumber(rank, "pp_rank", 0, origin));
  return at;
}

}  // namespace weightd
