#include "daemon/layout/rule_file.h"

#include <algorithm>
#include <cctype>

namespace weightd {
namespace {

template <typename... Args>
Status Malformed(fmt::format_string<Args...> format, Args&&... args) {
  return Error(StatusCode::kInvalidArgument, reason::kRuleFile,
               "correct the line (loaders/README.md describes the format)", format,
               std::forward<Args>(args)...);
}

std::string_view Trim(std::string_view text) {
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.front()))) {
    text.remove_prefix(1);
  }
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back()))) {
    text.remove_suffix(1);
  }
  return text;
}

// A comment is a '#' that begins the line or follows a space, and is followed by a space or
// nothing: "#l" is a capture.
std::string_view WithoutComment(std::string_view line) {
  for (size_t i = 0; i < line.size(); ++i) {
    const bool starts = line[i] == '#' && (i == 0 || line[i - 1] == ' ' || line[i - 1] == '\t');
    const bool ends = i + 1 == line.size() || line[i + 1] == ' ' || line[i + 1] == '#';
    if (starts && ends) return line.substr(0, i);
  }
  return line;
}

// The first word of `rest`, removed from it.
std::string_view TakeWord(std::string_view* rest) {
  *rest = Trim(*rest);
  const size_t end = std::min(rest->find_first_of(" \t"), rest->size());
  const std::string_view word = rest->substr(0, end);
  *rest = Trim(rest->substr(end));
  return word;
}

bool ValidName(std::string_view name, std::string_view extra) {
  return !name.empty() && std::all_of(name.begin(), name.end(), [extra](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || extra.find(c) != std::string_view::npos;
  });
}

// "embedded:llama", "dir/llama.rules" -> "llama"
std::string Stem(std::string_view origin) {
  const size_t slash = origin.find_last_of("/:");
  if (slash != std::string_view::npos) origin.remove_prefix(slash + 1);
  if (origin.ends_with(".rules")) origin.remove_suffix(6);
  return std::string(origin);
}

class RuleFileParser {
 public:
  explicit RuleFileParser(std::string origin) {
    file_.origin = std::move(origin);
    file_.name = Stem(file_.origin);
  }

  StatusOr<RuleFile> Run(std::string_view text) {
    while (!text.empty()) {
      ++line_;
      const size_t end = std::min(text.find('\n'), text.size());
      const Status status = ParseLine(Trim(WithoutComment(text.substr(0, end))));
      if (!status.ok()) return AtLine(status);
      text.remove_prefix(std::min(end + 1, text.size()));
    }
    const Status status = CheckComplete();
    if (!status.ok()) return AtLine(status);
    return std::move(file_);
  }

 private:
  Status AtLine(const Status& status) const {
    const ErrorFields fields = FieldsOf(status);
    return MakeError(status.code(),
                     fmt::format("{}:{}: {}", file_.origin, std::max(line_, 1), Message(status)),
                     {.reason = reason::kRuleFile, .remedy = fields.remedy});
  }

  Status ParseLine(std::string_view line) {
    if (line.empty()) return absl::OkStatus();
    if (line.find(" : ") != std::string_view::npos) return ParseRule(line);
    const std::string_view keyword = TakeWord(&line);
    if (keyword == "architecture" || keyword == "alias") {
      if (keyword == "alias" && file_.architectures.empty()) {
        return Malformed("alias before the first architecture: '{}'", line);
      }
      return AddUnique(line, "architecture", &file_.architectures);
    }
    if (keyword == "profile") return AddUnique(line, "profile", &file_.profiles);
    if (keyword == "source") {
      return line == "hf" ? absl::OkStatus()
                          : Malformed("unknown source profile '{}' (known: hf)", line);
    }
    if (keyword == "symbol") return ParseSymbol(line);
    if (keyword == "require") return ParseRequirement(line);
    if (keyword == "head") {
      if (!file_.head.empty()) return Malformed("a second head: '{}'", line);
      if (!ValidName(line, "._-")) return Malformed("head wants one parameter name: '{}'", line);
      file_.head = std::string(line);
      return absl::OkStatus();
    }
    return Malformed(
        "unknown keyword '{}' (known: architecture, alias, profile, source, symbol, head, require; "
        "a rule has ' : ' before its operations)",
        keyword);
  }

  static Status AddUnique(std::string_view value, std::string_view what,
                          std::vector<std::string>* values) {
    if (!ValidName(value, "._-")) return Malformed("{} wants one name: '{}'", what, value);
    if (std::find(values->begin(), values->end(), value) != values->end()) {
      return Malformed("{} declared twice: {}", what, value);
    }
    values->emplace_back(value);
    return absl::OkStatus();
  }

  Status ParseSymbol(std::string_view line) {
    const size_t equals = line.find('=');
    if (equals == std::string_view::npos) return Malformed("symbol wants 'NAME = EXPRESSION'");
    const std::string name(Trim(line.substr(0, equals)));
    if (!ValidName(name, "_") || std::isdigit(static_cast<unsigned char>(name[0]))) {
      return Malformed("not a symbol name: '{}'", name);
    }
    if (HasSymbol(name)) return Malformed("symbol defined twice: {}", name);
    WEIGHTD_ASSIGN_OR_RETURN(Expression value, Expression::Parse(Trim(line.substr(equals + 1))));
    WEIGHTD_RETURN_IF_ERROR(CheckNames(value, Place::kSymbol, nullptr));
    file_.symbols.push_back({line_, name, std::move(value)});
    return absl::OkStatus();
  }

  Status ParseRequirement(std::string_view line) {
    WEIGHTD_ASSIGN_OR_RETURN(Expression condition, Expression::Parse(line));
    WEIGHTD_RETURN_IF_ERROR(CheckNames(condition, Place::kRequirement, nullptr));
    file_.requirements.push_back({line_, std::move(condition)});
    return absl::OkStatus();
  }

  Status ParseRule(std::string_view line) {
    const size_t colon = line.find(" : ");
    std::string_view left = line.substr(0, colon);
    std::string_view right = Trim(line.substr(colon + 3));
    Rule rule;
    rule.line = line_;
    WEIGHTD_ASSIGN_OR_RETURN(rule.pattern, NamePattern::Parse(TakeWord(&left)));
    if (const size_t at = right.find("if="); at != std::string_view::npos) {
      WEIGHTD_ASSIGN_OR_RETURN(rule.condition, Expression::Parse(Trim(right.substr(at + 3))));
      WEIGHTD_RETURN_IF_ERROR(CheckNames(*rule.condition, Place::kRule, &rule.pattern));
      right = Trim(right.substr(0, at));
    }
    if (right.ends_with(" optional")) {
      rule.optional = true;
      right = Trim(right.substr(0, right.size() - std::string_view("optional").size()));
    }
    WEIGHTD_ASSIGN_OR_RETURN(rule.ops, ParseOps(right, rule.pattern));
    WEIGHTD_RETURN_IF_ERROR(ParseTarget(left, &rule));
    WEIGHTD_RETURN_IF_ERROR(CheckOps(&rule));
    rule.phase = NextPhase(rule);
    file_.rules.push_back(std::move(rule));
    return absl::OkStatus();
  }

  static Status ParseTarget(std::string_view left, Rule* rule) {
    const std::string_view arrow = TakeWord(&left);
    if (arrow.empty() && rule->skips()) return absl::OkStatus();
    if (arrow != "->" || left.empty() || left.find(' ') != std::string_view::npos) {
      return Malformed(
          "a rule is '<pattern> -> <parameter or &> : <operations>', or '<pattern> : "
          "skip'");
    }
    if (rule->skips()) {
      return left == "&" ? absl::OkStatus() : Malformed("a rule that skips has no parameter");
    }
    WEIGHTD_ASSIGN_OR_RETURN(rule->target, TargetPattern::Parse(left, rule->pattern));
    return absl::OkStatus();
  }

  Status CheckOps(Rule* rule) const {
    const OpSpec& main = rule->ops.main;
    for (size_t i = 0; i < main.args.size(); ++i) {
      WEIGHTD_RETURN_IF_ERROR(CheckNames(main.args[i], Place::kRule, &rule->pattern));
      const bool expert = main.kind == OpKind::kMoe && i == 0;
      if (expert && rule->pattern.IntegerIndex(main.args[0].text()) < 0) {
        return Malformed("moe() wants the capture that counts experts: '{}'", main.text);
      }
      if (!expert && main.args[i].reads_captures()) rule->ops_read_captures = true;
    }
    for (const OpSpec& permutation : rule->ops.permutation) {
      for (const Expression& argument : permutation.args) {
        WEIGHTD_RETURN_IF_ERROR(CheckNames(argument, Place::kRule, &rule->pattern));
        if (argument.reads_captures()) rule->ops_read_captures = true;
      }
    }
    return absl::OkStatus();
  }

  bool HasSymbol(std::string_view name) const {
    return std::any_of(file_.symbols.begin(), file_.symbols.end(),
                       [name](const SymbolDefinition& symbol) { return symbol.name == name; });
  }

  enum class Place { kSymbol, kRequirement, kRule };

  // Every name an expression reads must exist: an earlier symbol; in symbol lines a config field or
  // size(); in requirements the rank's sizes; in rules a capture of `pattern`.
  Status CheckNames(const Expression& expression, Place place, const NamePattern* pattern) const {
    if (expression.reads_sizes() && place != Place::kSymbol) {
      return Malformed("only symbol lines may use size(): '{}'", expression.text());
    }
    for (const std::string& name : expression.names()) {
      if (name.starts_with("config.")) {
        if (place == Place::kSymbol && name.size() > 7) continue;
        return Malformed("only symbol lines may read the config: '{}'", name);
      }
      if (name.starts_with('#')) {
        if (pattern != nullptr && pattern->IntegerIndex(name) >= 0) continue;
        return Malformed("{} is not captured by the rule's pattern", name);
      }
      if (HasSymbol(name)) continue;
      if (place == Place::kRequirement &&
          std::find(std::begin(kRankSymbols), std::end(kRankSymbols), name) !=
              std::end(kRankSymbols)) {
        continue;
      }
      return Malformed("unknown symbol '{}' in '{}': define it above with 'symbol {} = ...'", name,
                       expression.text(), name);
    }
    return absl::OkStatus();
  }

  // Rules that follow each other with the same text before their first number share a phase: their
  // parameters are ordered by that number first.
  int NextPhase(const Rule& rule) {
    std::string prefix;
    const std::vector<NamePattern::Token>& tokens = rule.pattern.tokens();
    for (const NamePattern::Token& token : tokens) {
      if (token.kind == NamePattern::Token::Kind::kInteger) break;
      prefix += token.kind == NamePattern::Token::Kind::kLiteral ? token.text : "()";
    }
    const bool layered = !rule.pattern.integer_names().empty();
    if (rule.skips()) return phase_;
    if (!layered || prefix != prefix_) ++phase_;
    prefix_ = layered ? prefix : "";
    return phase_;
  }

  Status CheckComplete() const {
    if (file_.architectures.empty()) return Malformed("the file declares no architecture");
    if (file_.profiles.empty()) return Malformed("the file declares no engine profile");
    if (file_.rules.empty()) return Malformed("the file has no rule");
    if (!file_.head.empty() && !HasSymbol("tie")) {
      return Malformed("head wants a symbol 'tie', which its presence overrides");
    }
    return absl::OkStatus();
  }

  RuleFile file_;
  int line_ = 0;
  int phase_ = 0;
  std::string prefix_;
};

}  // namespace

StatusOr<RuleFile> RuleFile::Parse(std::string_view text, std::string origin) {
  return RuleFileParser(std::move(origin)).Run(text);
}

}  // namespace weightd
