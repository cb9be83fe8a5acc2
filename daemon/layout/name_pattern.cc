#include "daemon/layout/name_pattern.h"

#include <algorithm>
#include <cctype>
#include <charconv>

namespace weightd {
namespace {

using Token = NamePattern::Token;

template <typename... Args>
Status Malformed(fmt::format_string<Args...> format, Args&&... args) {
  return Error(StatusCode::kInvalidArgument, reason::kRuleFile,
               "correct the pattern in the rule file", format, std::forward<Args>(args)...);
}

bool IsDigit(char c) { return std::isdigit(static_cast<unsigned char>(c)) != 0; }

void AddLiteral(char c, std::vector<Token>* tokens) {
  if (tokens->empty() || tokens->back().kind != Token::Kind::kLiteral) tokens->push_back({});
  tokens->back().text += c;
}

std::string_view ReadWord(std::string_view text) {
  size_t end = 0;
  while (end < text.size() && std::isalpha(static_cast<unsigned char>(text[end]))) ++end;
  return text.substr(0, end);
}

std::vector<std::string> SplitChoices(std::string_view text) {
  std::vector<std::string> choices;
  while (true) {
    const size_t bar = text.find('|');
    choices.emplace_back(text.substr(0, bar));
    if (bar == std::string_view::npos) return choices;
    text.remove_prefix(bar + 1);
  }
}

void AppendTokens(const std::vector<Token>& tokens, const Captures& captures, std::string* out) {
  for (const Token& token : tokens) {
    const size_t index = static_cast<size_t>(token.index);
    switch (token.kind) {
      case Token::Kind::kLiteral:
        *out += token.text;
        break;
      case Token::Kind::kInteger: {
        char digits[24];
        const auto end = std::to_chars(digits, digits + sizeof(digits), captures.integers[index]);
        out->append(digits, end.ptr);
        break;
      }
      case Token::Kind::kGroup:
        *out += token.choices[static_cast<size_t>(captures.alternatives[index])];
        break;
      case Token::Kind::kStar:
        *out += '*';
        break;
    }
  }
}

}  // namespace

StatusOr<NamePattern> NamePattern::Parse(std::string_view text) {
  NamePattern pattern;
  pattern.text_ = std::string(text);
  if (text.empty()) return Malformed("empty pattern");
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '#') {
      const std::string_view word = ReadWord(text.substr(i + 1));
      if (word.empty()) return Malformed("'#' wants a name in pattern '{}'", text);
      const std::string name = "#" + std::string(word);
      if (pattern.IntegerIndex(name) >= 0) {
        return Malformed("{} appears twice in pattern '{}'", name, text);
      }
      pattern.tokens_.push_back({.kind = Token::Kind::kInteger,
                                 .index = static_cast<int>(pattern.integer_names_.size())});
      pattern.integer_names_.push_back(name);
      i += word.size();
    } else if (c == '(') {
      const size_t close = text.find(')', i);
      if (close == std::string_view::npos) return Malformed("'(' without ')' in '{}'", text);
      Token token{.kind = Token::Kind::kGroup, .index = static_cast<int>(pattern.groups_.size())};
      token.choices = SplitChoices(text.substr(i + 1, close - i - 1));
      pattern.groups_.push_back(token.choices);
      pattern.tokens_.push_back(std::move(token));
      i = close;
    } else if (c == '*') {
      pattern.tokens_.push_back({.kind = Token::Kind::kStar});
      pattern.has_star_ = true;
    } else if (std::isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '-') {
      AddLiteral(c, &pattern.tokens_);
    } else {
      return Malformed("unexpected character '{}' in pattern '{}'", c, text);
    }
  }
  if (std::max(pattern.groups_.size(), pattern.integer_names_.size()) > kMaxCaptures) {
    return Malformed("more than {} captures in pattern '{}'", kMaxCaptures, text);
  }
  return pattern;
}

int NamePattern::IntegerIndex(std::string_view name) const {
  const auto found = std::find(integer_names_.begin(), integer_names_.end(), name);
  return found == integer_names_.end() ? -1 : static_cast<int>(found - integer_names_.begin());
}

bool NamePattern::Match(std::string_view name, Captures* captures) const {
  // Most names fail on the last literal, which is cheaper to see than the numbers before it.
  const Token& last = tokens_.back();
  if (last.kind == Token::Kind::kLiteral && !name.ends_with(last.text)) return false;
  return MatchFrom(tokens_, 0, name, captures);
}

bool NamePattern::MatchFrom(const std::vector<Token>& tokens, size_t index, std::string_view rest,
                            Captures* captures) {
  for (; index < tokens.size(); ++index) {
    const Token& token = tokens[index];
    if (token.kind == Token::Kind::kLiteral) {
      if (!rest.starts_with(token.text)) return false;
      rest.remove_prefix(token.text.size());
    } else if (token.kind == Token::Kind::kInteger) {
      size_t digits = 0;
      while (digits < rest.size() && IsDigit(rest[digits])) ++digits;
      if (digits == 0 || digits > 18 || (digits > 1 && rest[0] == '0')) return false;
      int64_t value = 0;
      std::from_chars(rest.data(), rest.data() + digits, value);
      captures->integers[static_cast<size_t>(token.index)] = value;
      rest.remove_prefix(digits);
    } else if (token.kind == Token::Kind::kGroup) {
      for (size_t choice = 0; choice < token.choices.size(); ++choice) {
        const std::string& text = token.choices[choice];
        if (!rest.starts_with(text)) continue;
        captures->alternatives[static_cast<size_t>(token.index)] = static_cast<int8_t>(choice);
        if (MatchFrom(tokens, index + 1, rest.substr(text.size()), captures)) return true;
      }
      return false;
    } else {
      for (size_t skip = 0; skip <= rest.size(); ++skip) {
        if (MatchFrom(tokens, index + 1, rest.substr(skip), captures)) return true;
      }
      return false;
    }
  }
  return rest.empty();
}

void NamePattern::AppendName(const Captures& captures, std::string* out) const {
  AppendTokens(tokens_, captures, out);
}

StatusOr<TargetPattern> TargetPattern::Parse(std::string_view text, const NamePattern& source) {
  TargetPattern target;
  target.text_ = std::string(text);
  if (text == "&") {
    if (source.has_star()) return Malformed("'*' only fits rules that skip: '{}'", source.text());
    target.tokens_ = source.tokens();
    return target;
  }
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '#') {
      const std::string_view word = ReadWord(text.substr(i + 1));
      const int index = source.IntegerIndex("#" + std::string(word));
      if (index < 0) return Malformed("#{} is not captured by '{}'", word, source.text());
      target.tokens_.push_back({.kind = Token::Kind::kInteger, .index = index});
      i += word.size();
    } else if (c == '$') {
      const int group = i + 1 < text.size() && IsDigit(text[i + 1]) ? text[i + 1] - '1' : -1;
      if (group < 0 || group >= static_cast<int>(source.groups().size())) {
        return Malformed("'{}' refers to a group that '{}' does not have", text.substr(i, 2),
                         source.text());
      }
      target.tokens_.push_back({.kind = Token::Kind::kGroup,
                                .index = group,
                                .choices = source.groups()[static_cast<size_t>(group)]});
      ++i;
    } else if (std::isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '-') {
      AddLiteral(c, &target.tokens_);
    } else {
      return Malformed("unexpected character '{}' in parameter name '{}'", c, text);
    }
  }
  return target;
}

void TargetPattern::AppendName(const Captures& captures, std::string* out) const {
  AppendTokens(tokens_, captures, out);
}

bool TargetPattern::Makes(std::string_view name) const {
  Captures captures;
  return NamePattern::MatchFrom(tokens_, 0, name, &captures);
}

std::vector<std::string> TargetPattern::SourcesOf(std::string_view name, const NamePattern& source,
                                                  int64_t integer_limit, size_t limit) const {
  Captures captures;
  if (!NamePattern::MatchFrom(tokens_, 0, name, &captures)) return {};
  const auto determined = [this](Token::Kind kind, size_t index) {
    return std::any_of(tokens_.begin(), tokens_.end(), [&](const Token& token) {
      return token.kind == kind && static_cast<size_t>(token.index) == index;
    });
  };
  std::vector<Captures> all = {captures};
  for (size_t group = 0; group < source.groups().size(); ++group) {
    if (determined(Token::Kind::kGroup, group)) continue;
    std::vector<Captures> wider;
    for (const Captures& base : all) {
      for (size_t choice = 0; choice < source.groups()[group].size(); ++choice) {
        wider.push_back(base);
        wider.back().alternatives[group] = static_cast<int8_t>(choice);
      }
    }
    all = std::move(wider);
  }
  for (size_t integer = 0; integer < source.integer_names().size(); ++integer) {
    if (determined(Token::Kind::kInteger, integer)) continue;
    std::vector<Captures> wider;
    for (int64_t value = 0; value < integer_limit && wider.size() < limit; ++value) {
      for (const Captures& base : all) {
        wider.push_back(base);
        wider.back().integers[integer] = value;
      }
    }
    all = std::move(wider);
  }
  std::vector<std::string> names;
  for (const Captures& one : all) {
    if (names.size() == limit) break;
    source.AppendName(one, &names.emplace_back());
  }
  return names;
}

}  // namespace weightd
