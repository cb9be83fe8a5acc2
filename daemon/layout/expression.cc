#include "daemon/layout/expression.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <initializer_list>

namespace weightd {
namespace {

constexpr char kRemedy[] = "correct the expression in the rule file";

template <typename... Args>
Status Malformed(fmt::format_string<Args...> format, Args&&... args) {
  return Error(StatusCode::kInvalidArgument, reason::kRuleFile, kRemedy, format,
               std::forward<Args>(args)...);
}

bool IsNameStart(char c) { return std::isalpha(static_cast<unsigned char>(c)) || c == '_'; }
bool IsNameChar(char c) { return IsNameStart(c) || std::isdigit(static_cast<unsigned char>(c)); }

// Deepest nesting: a rule file is data, and the parser recurses.
constexpr int kMaxDepth = 64;

}  // namespace

/// Recursive descent over one line of text.
class ExpressionParser {
 public:
  explicit ExpressionParser(std::string_view text) { expression_.text_ = std::string(text); }

  StatusOr<Expression> Run() {
    WEIGHTD_ASSIGN_OR_RETURN(expression_.root_, ParseLevel(0));
    SkipSpace();
    if (position_ != text().size()) {
      return Malformed("unexpected text in expression: '{}'", text().substr(position_));
    }
    return std::move(expression_);
  }

 private:
  using Kind = Expression::Kind;
  using Node = Expression::Node;

  std::string_view text() const { return expression_.text_; }
  void SkipSpace() {
    while (position_ < text().size() && text()[position_] == ' ') ++position_;
  }
  bool Accept(std::string_view token) {
    SkipSpace();
    if (!text().substr(position_).starts_with(token)) return false;
    const size_t end = position_ + token.size();
    if (IsNameStart(token.front()) && end < text().size() && IsNameChar(text()[end])) return false;
    position_ = end;
    return true;
  }
  int Add(Node node) {
    expression_.nodes_.push_back(std::move(node));
    return static_cast<int>(expression_.nodes_.size()) - 1;
  }

  // Binary operators by level, loosest first; longer tokens before their prefixes.
  static const std::vector<std::vector<std::string_view>>& Levels() {
    static const std::vector<std::vector<std::string_view>> levels = {
        {"else"}, {"or"}, {"and"}, {"==", "!=", "<=", ">=", "<", ">"}, {"+", "-"}, {"*", "/", "%"},
    };
    return levels;
  }

  StatusOr<int> ParseLevel(size_t level) {
    if (level == Levels().size()) return ParsePrimary();
    WEIGHTD_ASSIGN_OR_RETURN(int left, ParseLevel(level + 1));
    while (true) {
      std::string_view found;
      for (std::string_view op : Levels()[level]) {
        if (Accept(op)) {
          found = op;
          break;
        }
      }
      if (found.empty()) return left;
      WEIGHTD_ASSIGN_OR_RETURN(const int right, ParseLevel(level + 1));
      left = Add({.kind = Kind::kBinary, .op = std::string(found), .a = left, .b = right});
    }
  }

  StatusOr<int> ParsePrimary() {
    SkipSpace();
    if (++depth_ > kMaxDepth) return Malformed("expression nested deeper than {}", kMaxDepth);
    StatusOr<int> result = ParseUnguarded();
    --depth_;
    return result;
  }

  StatusOr<int> ParseUnguarded() {
    if (position_ == text().size()) return Malformed("expression ends too early: '{}'", text());
    const char first = text()[position_];
    if (std::isdigit(static_cast<unsigned char>(first))) return ParseNumber();
    if (Accept("(")) {
      WEIGHTD_ASSIGN_OR_RETURN(const int inner, ParseLevel(0));
      WEIGHTD_RETURN_IF_ERROR(Expect(")"));
      return inner;
    }
    if (first != '#' && !IsNameStart(first)) {
      return Malformed("unexpected character in expression: '{}'", first);
    }
    size_t end = position_ + 1;
    while (end < text().size() && (IsNameChar(text()[end]) || text()[end] == '.')) ++end;
    const std::string name(text().substr(position_, end - position_));
    position_ = end;
    if (Accept("(")) return ParseCall(name);
    expression_.names_.push_back(name);
    return Add({.kind = Kind::kName, .op = name});
  }

  StatusOr<int> ParseNumber() {
    int64_t value = 0;
    const char* begin = text().data() + position_;
    const auto [end, error] = std::from_chars(begin, text().data() + text().size(), value);
    if (error != std::errc()) return Malformed("number too large in '{}'", text());
    position_ += static_cast<size_t>(end - begin);
    return Add({.kind = Kind::kNumber, .number = value});
  }

  Status Expect(std::string_view token) {
    if (Accept(token)) return absl::OkStatus();
    return Malformed("expected '{}' in expression: '{}'", token, text());
  }

  StatusOr<int> ParseCall(const std::string& name) {
    if (name == "size") return ParseSize();
    const size_t wanted = name == "not" ? 1 : name == "pick" ? 3 : 0;
    if (wanted == 0) return Malformed("unknown function '{}' (known: not, pick, size)", name);
    int arguments[3] = {-1, -1, -1};
    for (size_t i = 0; i < wanted; ++i) {
      if (i > 0) WEIGHTD_RETURN_IF_ERROR(Expect(","));
      WEIGHTD_ASSIGN_OR_RETURN(arguments[i], ParseLevel(0));
    }
    WEIGHTD_RETURN_IF_ERROR(Expect(")"));
    return Add({.kind = wanted == 1 ? Kind::kNot : Kind::kPick,
                .a = arguments[0],
                .b = arguments[1],
                .c = arguments[2]});
  }

  StatusOr<int> ParseSize() {
    const size_t comma = text().find(',', position_);
    if (comma == std::string_view::npos) {
      return Malformed("size() wants a pattern and a dimension: '{}'", text());
    }
    std::string pattern(text().substr(position_, comma - position_));
    position_ = comma + 1;
    SkipSpace();
    if (position_ == text().size() ||
        !std::isdigit(static_cast<unsigned char>(text()[position_]))) {
      return Malformed("size() wants a dimension as its second argument: '{}'", text());
    }
    WEIGHTD_ASSIGN_OR_RETURN(const int number, ParseNumber());
    WEIGHTD_RETURN_IF_ERROR(Expect(")"));
    const int64_t dim = expression_.nodes_[static_cast<size_t>(number)].number;
    expression_.reads_sizes_ = true;
    return Add(
        {.kind = Kind::kSize, .op = std::move(pattern), .number = std::min<int64_t>(dim, 99)});
  }

  Expression expression_;
  size_t position_ = 0;
  int depth_ = 0;
};

StatusOr<Expression> Expression::Parse(std::string_view text) {
  return ExpressionParser(text).Run();
}

bool Expression::reads_captures() const {
  return std::any_of(names_.begin(), names_.end(),
                     [](const std::string& name) { return name.starts_with('#'); });
}

StatusOr<int64_t> Expression::Evaluate(const Scope& scope) const {
  WEIGHTD_ASSIGN_OR_RETURN(const std::optional<int64_t> value, EvaluateNode(root_, scope));
  if (value.has_value()) return *value;
  return Error(StatusCode::kInvalidArgument, reason::kConfig,
               "give the model's complete Hugging Face config",
               "the model's config lacks a field that the loader needs: {}", text_);
}

Expression::Value Expression::EvaluateNode(int index, const Scope& scope) const {
  const Node& node = nodes_[static_cast<size_t>(index)];
  switch (node.kind) {
    case Kind::kNumber:
      return std::optional<int64_t>(node.number);
    case Kind::kName:
      return scope.Lookup(node.op);
    case Kind::kSize:
      return scope.Size(node.op, static_cast<int>(node.number));
    case Kind::kNot: {
      WEIGHTD_ASSIGN_OR_RETURN(std::optional<int64_t> value, EvaluateNode(node.a, scope));
      if (value.has_value()) value = *value == 0 ? 1 : 0;
      return value;
    }
    case Kind::kPick: {
      WEIGHTD_ASSIGN_OR_RETURN(const std::optional<int64_t> which, EvaluateNode(node.a, scope));
      if (!which.has_value()) return which;
      return EvaluateNode(*which != 0 ? node.b : node.c, scope);
    }
    case Kind::kBinary:
      return EvaluateBinary(node, scope);
  }
  return std::optional<int64_t>();
}

Expression::Value Expression::EvaluateBinary(const Node& node, const Scope& scope) const {
  WEIGHTD_ASSIGN_OR_RETURN(const std::optional<int64_t> left, EvaluateNode(node.a, scope));
  const std::string& op = node.op;
  if (op == "else") return left.has_value() ? Value(left) : EvaluateNode(node.b, scope);
  if (!left.has_value()) return left;
  if (op == "and" && *left == 0) return std::optional<int64_t>(0);
  if (op == "or" && *left != 0) return std::optional<int64_t>(1);
  WEIGHTD_ASSIGN_OR_RETURN(const std::optional<int64_t> right, EvaluateNode(node.b, scope));
  if (!right.has_value()) return right;
  const int64_t a = *left;
  const int64_t b = *right;
  int64_t result = 0;
  bool overflow = false;
  if (op == "+") overflow = __builtin_add_overflow(a, b, &result);
  if (op == "-") overflow = __builtin_sub_overflow(a, b, &result);
  if (op == "*") overflow = __builtin_mul_overflow(a, b, &result);
  if (op == "/" || op == "%") {
    if (b <= 0 || a < 0) {
      return Error(StatusCode::kInvalidArgument, reason::kConfig, "correct the model's config",
                   "division in '{}' has no meaning: {} {} {}", text_, a, op, b);
    }
    result = op == "/" ? a / b : a % b;
  }
  if (overflow) {
    return Error(StatusCode::kInvalidArgument, reason::kConfig, "correct the model's config",
                 "'{}' overflows: {} {} {}", text_, a, op, b);
  }
  if (op == "==") result = a == b;
  if (op == "!=") result = a != b;
  if (op == "<") result = a < b;
  if (op == "<=") result = a <= b;
  if (op == ">") result = a > b;
  if (op == ">=") result = a >= b;
  if (op == "and" || op == "or") result = b != 0;
  return std::optional<int64_t>(result);
}

}  // namespace weightd
