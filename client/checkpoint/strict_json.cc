#include "client/checkpoint/strict_json.h"

#include <unordered_set>
#include <vector>

namespace weightd {
namespace {

using Json = nlohmann::json;

constexpr int kMostLevels = 8;
constexpr char kRemedy[] = "write or download the file again";

// Brackets outside of strings, so that no depth of nesting reaches the parser.
bool TooDeep(std::string_view text) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      if (++depth > kMostLevels) return true;
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
  return false;
}

// The first key that an object has twice, which the parser would drop.
class KeyWatch {
 public:
  void See(Json::parse_event_t event, const Json& parsed) {
    if (event == Json::parse_event_t::object_start) open_.emplace_back();
    if (event == Json::parse_event_t::object_end) open_.pop_back();
    if (event != Json::parse_event_t::key || twice_) return;
    const auto& key = parsed.get_ref<const std::string&>();
    if (open_.back().insert(key).second) return;
    twice_ = true;
    key_ = key;
  }
  bool twice() const { return twice_; }
  const std::string& key() const { return key_; }

 private:
  std::vector<std::unordered_set<std::string>> open_;
  bool twice_ = false;
  std::string key_;
};

}  // namespace

StatusOr<Json> ParseStrictJson(std::string_view text, std::string_view what) {
  if (TooDeep(text)) {
    return Error(StatusCode::kInvalidArgument, reason::kCheckpoint, kRemedy,
                 "the {} is nested more than {} levels deep", what, kMostLevels);
  }
  KeyWatch watch;
  const auto see = [&watch](int, Json::parse_event_t event, Json& parsed) {
    watch.See(event, parsed);
    return true;
  };
  Json json = Json::parse(text.begin(), text.end(), see, false);
  if (!json.is_object()) {
    return Error(StatusCode::kInvalidArgument, reason::kCheckpoint, kRemedy,
                 "the {} is not a JSON object in UTF-8: {} bytes", what, text.size());
  }
  if (watch.twice()) {
    return WithTensor(Error(StatusCode::kInvalidArgument, reason::kDuplicateTensor, kRemedy,
                            "the {} names something twice: {}", what, watch.key()),
                      watch.key());
  }
  return json;
}

}  // namespace weightd
