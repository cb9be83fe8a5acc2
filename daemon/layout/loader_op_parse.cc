#include <algorithm>
#include <cctype>
#include <charconv>

#include "daemon/layout/loader_op.h"

namespace weightd {
namespace {

template <typename... Args>
Status Malformed(fmt::format_string<Args...> format, Args&&... args) {
  return Error(StatusCode::kInvalidArgument, reason::kRuleFile,
               "correct the operation in the rule file (loaders/README.md lists them)", format,
               std::forward<Args>(args)...);
}

// What an op takes. Arguments that are not written get the defaults, in order; `implied` ones are
// always appended.
struct OpInfo {
  std::string_view name;
  OpKind kind;
  size_t min_args;
  size_t max_args;
  std::vector<std::string_view> defaults;
  std::vector<std::string_view> implied;
  std::vector<std::string_view> slots;  // named slots; "*" stands for numbered ones
};

const std::vector<OpInfo>& Ops() {
  static const std::vector<OpInfo> ops = {
      {"skip", OpKind::kSkip, 0, 0, {}, {}, {}},
      {"rep", OpKind::kRep, 0, 0, {}, {}, {}},
      {"col", OpKind::kCol, 0, 1, {"1"}, {}, {}},
      {"row", OpKind::kRow, 0, 1, {"1"}, {}, {}},
      {"vocab", OpKind::kVocab, 0, 1, {"V"}, {}, {}},
      {"gqa", OpKind::kGqa, 0, 4, {"nq", "nkv", "d"}, {}, {"q", "k", "v"}},
      {"unfuse-gqa", OpKind::kUnfuseGqa, 0, 4, {"nq", "nkv", "d"}, {}, {}},
      {"kv", OpKind::kKv, 0, 2, {"nkv", "d"}, {}, {}},
      {"merge", OpKind::kMerge, 1, 8, {}, {}, {"*"}},
      {"rmerge", OpKind::kReplicatedMerge, 1, 8, {}, {}, {"*"}},
      {"unfuse-merge", OpKind::kUnfuseMerge, 1, 8, {}, {}, {}},
      {"moe", OpKind::kMoe, 1, 1, {}, {"E", "Im"}, {"gate", "up", "down"}},
      {"moe3",
       OpKind::kMoe3,
       0,
       1,
       {"1"},
       {"E", "Im"},
       {"gate_up", "down", "col", "row", "rep", "rank0"}},
      {"T", OpKind::kTranspose, 0, 0, {}, {}, {}},
      {"rope", OpKind::kRope, 0, 1, {"d"}, {}, {}},
      {"grouped", OpKind::kGrouped, 0, 3, {"nq", "nkv", "d"}, {}, {}},
  };
  return ops;
}

bool IsPermutation(OpKind kind) { return kind == OpKind::kRope || kind == OpKind::kGrouped; }

// Reads one op off the front of `text`: name, (arguments), .slot, the last two in either order.
class OpReader {
 public:
  explicit OpReader(std::string_view text) : text_(text) {}

  bool AtEnd() {
    while (!text_.empty() && text_.front() == ' ') text_.remove_prefix(1);
    return text_.empty();
  }

  StatusOr<OpSpec> Read(const NamePattern& pattern) {
    const std::string_view start = text_;
    size_t end = 0;
    while (end < text_.size() &&
           (std::isalnum(static_cast<unsigned char>(text_[end])) || text_[end] == '-')) {
      ++end;
    }
    const std::string_view name = text_.substr(0, end);
    const auto info =
        std::find_if(Ops().begin(), Ops().end(), [&](const OpInfo& op) { return op.name == name; });
    if (info == Ops().end()) {
      return Malformed("unknown operation '{}'", name.empty() ? text_.substr(0, 1) : name);
    }
    text_.remove_prefix(end);
    OpSpec op{.kind = info->kind};
    std::vector<std::string> arguments;
    bool has_arguments = false;
    while (!text_.empty() && text_.front() != ' ') {
      if (text_.front() == '(' && !has_arguments) {
        WEIGHTD_RETURN_IF_ERROR(ReadArguments(&arguments));
        has_arguments = true;
      } else if (text_.front() == '.' && op.slot.empty()) {
        ReadSlot(&op.slot);
      } else {
        return Malformed("unexpected text after operation {}: '{}'", name, text_);
      }
    }
    op.text = std::string(start.substr(0, start.size() - text_.size()));
    WEIGHTD_RETURN_IF_ERROR(FillArguments(*info, arguments, &op));
    WEIGHTD_RETURN_IF_ERROR(CheckSlot(*info, pattern, op));
    return op;
  }

 private:
  Status ReadArguments(std::vector<std::string>* arguments) {
    int depth = 0;
    std::string current;
    for (size_t i = 0; i < text_.size(); ++i) {
      const char c = text_[i];
      if (c == '(' && depth++ == 0) continue;
      if (c == ')' && --depth == 0) {
        arguments->push_back(current);
        text_.remove_prefix(i + 1);
        return absl::OkStatus();
      }
      if (c == ',' && depth == 1) {
        arguments->push_back(current);
        current.clear();
        continue;
      }
      current += c;
    }
    return Malformed("'(' without ')' in '{}'", text_);
  }

  void ReadSlot(std::string* slot) {
    size_t end = 1;
    while (end < text_.size() && text_[end] != ' ' && text_[end] != '(' && text_[end] != '.') ++end;
    *slot = std::string(text_.substr(1, end - 1));
    text_.remove_prefix(end);
  }

  static Status FillArguments(const OpInfo& info, const std::vector<std::string>& arguments,
                              OpSpec* op) {
    if (arguments.size() < info.min_args || arguments.size() > info.max_args) {
      return Malformed("operation {} takes {} to {} arguments, not {}", info.name, info.min_args,
                       info.max_args, arguments.size());
    }
    if (!arguments.empty() && arguments.size() < info.defaults.size()) {
      return Malformed("operation {} takes all of its {} arguments or none, not {}", info.name,
                       info.defaults.size(), arguments.size());
    }
    std::vector<std::string> all = arguments;
    if (all.empty()) all.assign(info.defaults.begin(), info.defaults.end());
    all.insert(all.end(), info.implied.begin(), info.implied.end());
    for (const std::string& argument : all) {
      WEIGHTD_ASSIGN_OR_RETURN(op->args.emplace_back(), Expression::Parse(argument));
    }
    return absl::OkStatus();
  }

  static Status CheckSlot(const OpInfo& info, const NamePattern& pattern, const OpSpec& op) {
    const std::string& slot = op.slot;
    if (slot.empty() != info.slots.empty()) {
      return info.slots.empty() ? Malformed("operation {} has no slots: '{}'", info.name, op.text)
                                : Malformed("operation {} wants a slot: '{}'", info.name, op.text);
    }
    if (slot.empty()) return absl::OkStatus();
    if (slot[0] == '$') {
      const int group = slot.size() == 2 ? slot[1] - '1' : -1;
      if (group < 0 || group >= static_cast<int>(pattern.groups().size())) {
        return Malformed("slot '{}' refers to a group that '{}' does not have", slot,
                         pattern.text());
      }
      return absl::OkStatus();
    }
    const bool named = std::find(info.slots.begin(), info.slots.end(), slot) != info.slots.end();
    const bool numbered = info.slots[0] == "*" && std::isdigit(static_cast<unsigned char>(slot[0]));
    if (named || numbered) return absl::OkStatus();
    return Malformed("operation {} has no slot '{}'", info.name, slot);
  }

  std::string_view text_;
};

int SlotNumber(const OpSpec& op, std::string_view name) {
  for (const OpInfo& info : Ops()) {
    if (info.kind != op.kind) continue;
    const auto found = std::find(info.slots.begin(), info.slots.end(), name);
    if (found != info.slots.end()) return static_cast<int>(found - info.slots.begin());
  }
  return -1;
}

bool ReadNumber(std::string_view text, int* value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value);
  return error == std::errc() && end == text.data() + text.size() && *value >= 0;
}

// Which slots [begin, end) the op fills. A reference $k means the alternative by that name, or by
// its position in the group.
Status ResolveSlots(const OpSpec& op, const NamePattern& pattern, const Captures& captures,
                    BoundOp* bound) {
  const int count = static_cast<int>(op.args.size());
  if (op.kind == OpKind::kUnfuseGqa) bound->slot_end = 3;
  if (op.kind == OpKind::kUnfuseMerge) bound->slot_end = count;
  if (op.slot.empty()) return absl::OkStatus();
  int begin = -1;
  int last = -1;
  if (op.slot[0] == '$') {
    const size_t group = static_cast<size_t>(op.slot[1] - '1');
    const size_t choice = static_cast<size_t>(captures.alternatives[group]);
    begin = SlotNumber(op, pattern.groups()[group][choice]);
    if (begin < 0) begin = static_cast<int>(choice);
    last = begin;
  } else if (const int named = SlotNumber(op, op.slot); named >= 0) {
    begin = last = named;
  } else {
    const size_t dash = op.slot.find('-');
    const std::string_view slot = op.slot;
    if (!ReadNumber(slot.substr(0, dash), &begin)) begin = -1;
    last = begin;
    if (dash != std::string::npos && !ReadNumber(slot.substr(dash + 1), &last)) last = -1;
  }
  const bool merged = op.kind == OpKind::kMerge || op.kind == OpKind::kReplicatedMerge;
  const int limit = merged ? count : op.kind == OpKind::kMoe3 ? 6 : 3;
  if (begin < 0 || last < begin || last >= limit) {
    return Malformed("slot '{}' is not one of the {} slots of '{}'", op.slot, limit, op.text);
  }
  bound->slot_begin = begin;
  bound->slot_end = last + 1;
  return absl::OkStatus();
}

}  // namespace

StatusOr<RuleOps> ParseOps(std::string_view text, const NamePattern& pattern) {
  RuleOps ops;
  bool has_main = false;
  OpReader reader(text);
  while (!reader.AtEnd()) {
    WEIGHTD_ASSIGN_OR_RETURN(OpSpec op, reader.Read(pattern));
    if (has_main) return Malformed("'{}' follows the operation that places the tensor", op.text);
    if (op.kind == OpKind::kTranspose) {
      if (ops.transpose || !ops.permutation.empty()) return Malformed("T comes first, and once");
      ops.transpose = true;
    } else if (IsPermutation(op.kind)) {
      if (!ops.permutation.empty()) return Malformed("two row permutations: '{}'", op.text);
      ops.permutation.push_back(std::move(op));
    } else {
      ops.main = std::move(op);
      has_main = true;
    }
  }
  if (!has_main) return Malformed("no operation places the tensor: '{}'", text);
  if (ops.main.kind == OpKind::kSkip && (ops.transpose || !ops.permutation.empty())) {
    return Malformed("skip stands alone: '{}'", text);
  }
  // A slot that no match can fill is an error of the file, not of the model.
  BoundOp probe;
  Captures last;
  for (size_t group = 0; group < pattern.groups().size(); ++group) {
    const size_t choices = pattern.groups()[group].size();
    last.alternatives[group] = static_cast<int8_t>(choices - 1);
  }
  WEIGHTD_RETURN_IF_ERROR(ResolveSlots(ops.main, pattern, last, &probe));
  return ops;
}

namespace {

struct ExpectedSize {
  int dim = 0;  // of the view, after T
  int64_t size = 0;
  std::string text;
};

std::string SumText(const OpSpec& op, int begin, int end) {
  std::string text;
  for (int i = begin; i < end; ++i) {
    text += (text.empty() ? "" : " + ") + op.args[static_cast<size_t>(i)].text();
  }
  return text;
}

// The sizes that the arguments imply for the source, and the fewest dimensions it needs.
std::vector<ExpectedSize> Expected(const BoundOp& op, int* min_dims) {
  const OpSpec& spec = op.spec->main;
  const auto name = [&spec](size_t i) { return spec.args[i].text(); };
  const std::vector<int64_t>& a = op.args;
  *min_dims = 1;
  switch (op.kind) {
    case OpKind::kVocab:
      return {{0, a[0], name(0)}};
    case OpKind::kGqa:
    case OpKind::kUnfuseGqa: {
      const std::string v = spec.args.size() > 3 ? name(3) : name(2);
      const int64_t sizes[3] = {a[0] * a[2], a[1] * a[2], a[1] * a[3]};
      const std::string texts[3] = {fmt::format("({})*({})", name(0), name(2)),
                                    fmt::format("({})*({})", name(1), name(2)),
                                    fmt::format("({})*({})", name(1), v)};
      ExpectedSize sum{0, 0, ""};
      for (int slot = op.slot_begin; slot < op.slot_end; ++slot) {
        sum.size += sizes[slot];
        sum.text += (sum.text.empty() ? "" : " + ") + texts[slot];
      }
      return {sum};
    }
    case OpKind::kKv:
      return {{0, a[0] * a[1], fmt::format("({})*({})", name(0), name(1))}};
    case OpKind::kMerge:
    case OpKind::kReplicatedMerge:
    case OpKind::kUnfuseMerge: {
      ExpectedSize sum{0, 0, SumText(spec, op.slot_begin, op.slot_end)};
      for (int i = op.slot_begin; i < op.slot_end; ++i) sum.size += a[static_cast<size_t>(i)];
      return {sum};
    }
    case OpKind::kMoe:
      *min_dims = op.slot_begin == 2 ? 2 : 1;
      return {{op.slot_begin == 2 ? 1 : 0, a[2], name(2)}};
    case OpKind::kMoe3:
      *min_dims = op.slot_begin == 0 ? 2 : op.slot_begin == 1 || op.slot_begin == 3 ? 3 : 2;
      if (op.slot_begin == 0) return {{0, a[1], name(1)}, {1, 2 * a[2], "2*" + name(2)}};
      if (op.slot_begin == 1) return {{0, a[1], name(1)}, {2, a[2], name(2)}};
      return {{0, a[1], name(1)}};
    case OpKind::kRow:
      *min_dims = 2;
      return {};
    case OpKind::kRep:
      *min_dims = 0;
      return {};
    default:
      return {};
  }
}

Status CheckSource(const BoundOp& op) {
  int min_dims = 0;
  const std::vector<ExpectedSize> expected = Expected(op, &min_dims);
  if (op.transpose) min_dims = std::max(min_dims, 2);
  const int dims = op.source.size();
  constexpr char kRemedy[] = "give the config of the model that is trained";
  if (dims < min_dims || (op.kind == OpKind::kMoe && dims == kMaxDims)) {
    return Error(StatusCode::kInvalidArgument, reason::kShape, kRemedy,
                 "the tensor has {} dimensions, its rule ({}) wants at least {}: shape={}", dims,
                 op.spec->main.text, min_dims, ToString(op.source));
  }
  for (const ExpectedSize& size : expected) {
    int dim = size.dim;
    if (op.transpose && dim >= dims - 2) dim = dim == dims - 1 ? dims - 2 : dims - 1;
    if (op.source[dim] == size.size) continue;
    return Error(StatusCode::kInvalidArgument, reason::kShape, kRemedy,
                 "dimension {} has {} elements, the config implies {} = {}: shape={}", dim,
                 op.source[dim], size.text, size.size, ToString(op.source));
  }
  return absl::OkStatus();
}

// A row permutation maps all rows of the source onto each other.
Status CheckPermutation(const BoundOp& op) {
  if (op.permutation == OpKind::kSkip) return absl::OkStatus();
  const std::vector<int64_t>& a = op.permutation_args;
  const OpSpec& spec = op.spec->permutation[0];
  const int64_t rows = op.source.empty() ? 0 : op.source[op.transpose ? op.source.size() - 1 : 0];
  const bool fits = op.permutation == OpKind::kRope
                        ? rows > 0 && a[0] % 2 == 0 && rows % a[0] == 0
                        : a[0] % a[1] == 0 && rows == (a[0] + 2 * a[1]) * a[2];
  if (fits && !(op.transpose && op.source.size() != 2)) return absl::OkStatus();
  return Error(StatusCode::kInvalidArgument, reason::kShape,
               "give the config of the model that is trained",
               "the rows cannot be reordered by '{}' with sizes {}: shape={}", spec.text,
               fmt::join(a, ", "), ToString(op.source));
}

Status CheckPositive(const OpSpec& spec, const std::vector<int64_t>& args, size_t first) {
  for (size_t i = first; i < spec.args.size(); ++i) {
    if (args[i] > 0 && args[i] < (int64_t{1} << 31)) continue;
    return Error(StatusCode::kInvalidArgument, reason::kConfig,
                 "give the config of the model that is trained",
                 "a size in the config is not usable: {}={}", spec.args[i].text(), args[i]);
  }
  return absl::OkStatus();
}

StatusOr<std::vector<int64_t>> EvaluateAll(const OpSpec& spec, const Scope& scope) {
  std::vector<int64_t> values;
  for (const Expression& argument : spec.args) {
    WEIGHTD_ASSIGN_OR_RETURN(values.emplace_back(), argument.Evaluate(scope));
  }
  WEIGHTD_RETURN_IF_ERROR(CheckPositive(spec, values, spec.kind == OpKind::kMoe ? 1 : 0));
  return values;
}

}  // namespace

StatusOr<BoundOp> BindOp(const RuleOps& ops, const NamePattern& pattern, const Captures& captures,
                         const Shape& source, const Scope& scope) {
  BoundOp bound{.kind = ops.main.kind, .transpose = ops.transpose, .source = source, .spec = &ops};
  WEIGHTD_ASSIGN_OR_RETURN(bound.args, EvaluateAll(ops.main, scope));
  const bool gqa = bound.kind == OpKind::kGqa || bound.kind == OpKind::kUnfuseGqa;
  if (gqa && bound.args.size() == 3) bound.args.push_back(bound.args[2]);
  WEIGHTD_RETURN_IF_ERROR(ResolveSlots(ops.main, pattern, captures, &bound));
  if (!ops.permutation.empty()) {
    bound.permutation = ops.permutation[0].kind;
    WEIGHTD_ASSIGN_OR_RETURN(bound.permutation_args, EvaluateAll(ops.permutation[0], scope));
  }
  WEIGHTD_RETURN_IF_ERROR(CheckSource(bound));
  WEIGHTD_RETURN_IF_ERROR(CheckPermutation(bound));
  return bound;
}

}  // namespace weightd
