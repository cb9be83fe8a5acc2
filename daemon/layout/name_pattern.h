// Name patterns of rule files: literal text, #l (captures an integer), (a|b) (captures an
// alternative, an empty one allowed) and * (anything). No regular expressions.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/status.h"

namespace weightd {

inline constexpr int kMaxCaptures = 6;

/// What a match bound: integers in the order of their #names, alternatives as positions in their
/// groups.
struct Captures {
  std::array<int64_t, kMaxCaptures> integers{};
  std::array<int8_t, kMaxCaptures> alternatives{};
  bool operator==(const Captures&) const = default;
};

/// A pattern of source names. Thread safety: immutable.
class NamePattern {
 public:
  struct Token {
    enum class Kind : uint8_t { kLiteral, kInteger, kGroup, kStar };
    Kind kind = Kind::kLiteral;
    std::string text;                  // literal
    int index = 0;                     // which integer or group
    std::vector<std::string> choices;  // of a group
  };

  /// \error INVALID_ARGUMENT with a message that does not name a file
  static StatusOr<NamePattern> Parse(std::string_view text);

  /// Whether the whole of `name` matches. `captures` is valid only then. An integer has no leading
  /// zeros and at most 18 digits.
  bool Match(std::string_view name, Captures* captures) const;

  /// The name with these captures. \pre no star
  void AppendName(const Captures& captures, std::string* out) const;

  const std::string& text() const { return text_; }
  const std::vector<Token>& tokens() const { return tokens_; }
  const std::vector<std::string>& integer_names() const { return integer_names_; }
  /// The alternatives of each group.
  const std::vector<std::vector<std::string>>& groups() const { return groups_; }
  bool has_star() const { return has_star_; }
  /// Position of "#name" among the integers; -1 if it has none.
  int IntegerIndex(std::string_view name) const;

 private:
  friend class TargetPattern;
  static bool MatchFrom(const std::vector<Token>& tokens, size_t token, std::string_view rest,
                        Captures* captures);

  std::string text_;
  std::vector<Token> tokens_;
  std::vector<std::string> integer_names_;
  std::vector<std::vector<std::string>> groups_;
  bool has_star_ = false;
};

/// The name of an engine parameter, made from a source pattern's captures: literal text, #l, $1.
/// Thread safety: immutable.
class TargetPattern {
 public:
  /// "&" means the source's own name. \error INVALID_ARGUMENT if it uses what `source` does not
  /// bind
  static StatusOr<TargetPattern> Parse(std::string_view text, const NamePattern& source);

  void AppendName(const Captures& captures, std::string* out) const;

  /// Whether some captures make `name`.
  bool Makes(std::string_view name) const;

  /// The source names that `source` would map to parameter `name`: captures that the parameter's
  /// name does not determine run over their alternatives, integers over [0, integer_limit).
  /// Empty if the rule cannot produce `name`; at most `limit` names.
  std::vector<std::string> SourcesOf(std::string_view name, const NamePattern& source,
                                     int64_t integer_limit, size_t limit) const;

  const std::string& text() const { return text_; }

 private:
  std::string text_;
  std::vector<NamePattern::Token> tokens_;
};

}  // namespace weightd
