// Malformed rule files: each error names the file, the line and the remedy.
#include "daemon/layout/rule_file.h"

#include <fmt/format.h>

#include <catch2/catch.hpp>

namespace weightd {
namespace {

constexpr char kHeader[] =
    "architecture A\n"
    "profile p\n"
    "symbol nq = config.heads\n"
    "symbol nkv = nq\n"
    "symbol d = config.head_dim else 4\n";

std::string ErrorOf(const std::string& text) {
  const auto file = RuleFile::Parse(text, "dir/x.rules");
  if (file.ok()) return "";
  CHECK(FieldsOf(file.status()).reason == reason::kRuleFile);
  CHECK_FALSE(FieldsOf(file.status()).remedy.empty());
  return Message(file.status());
}

TEST_CASE("a malformed line is refused with its file and number") {
  struct Case {
    std::string line;
    std::string message;
  };
  const Case cases[] = {
      {"colour blue", "unknown keyword 'colour'"},
      {"a -> & : shuffle", "unknown operation 'shuffle'"},
      {"a -> & : col(bad)", "unknown symbol 'bad'"},
      {"a -> & : merge(d,d).2", "slot '2' is not one of the 2 slots"},
      {"a -> & : merge.0", "takes 1 to 8 arguments, not 0"},
      {"a -> & : gqa(nq).q", "takes all of its 3 arguments or none"},
      {"a -> & : gqa.x", "has no slot 'x'"},
      {"a -> & : gqa", "wants a slot"},
      {"a -> & : rep.q", "has no slots"},
      {"a -> & : rep(d)", "takes 0 to 0 arguments, not 1"},
      {"a -> & : vocab", "unknown symbol 'V'"},
      {"a -> & : moe(d).up", "moe() wants the capture that counts experts"},
      {"a.#e -> & : moe(#e).up", "unknown symbol 'E'"},
      {"a -> & : rep col", "follows the operation that places the tensor"},
      {"a -> & : T", "no operation places the tensor"},
      {"a -> b c : rep", "a rule is '<pattern> -> "},
      {"a : rep", "a rule is '<pattern> -> "},
      {"a -> b : skip", "a rule that skips has no parameter"},
      {"*.a -> & : rep", "'*' only fits rules that skip"},
      {"a.#l -> b.#k : rep", "#k is not captured"},
      {"a.(x|y -> & : rep", "'(' without ')'"},
      {"a -> b.$1 : rep", "refers to a group"},
      {"a -> & : merge(d,d).$1", "refers to a group"},
      {"a -> & : rep if=#l > 1", "#l is not captured"},
      {"a -> & : rep if=d >", "ends too early"},
      {"a -> & : rep if=config.x", "only symbol lines may read the config"},
      {"a -> & : rep if=half(d)", "unknown function 'half'"},
      {"symbol q = (d", "expected ')'"},
      {"symbol q = unknown + 1", "unknown symbol 'unknown'"},
      {"symbol d = 3", "symbol defined twice: d"},
      {"symbol 3d = 3", "not a symbol name"},
      {"architecture A", "architecture declared twice: A"},
      {"alias A", "architecture declared twice: A"},
      {"profile p", "profile declared twice: p"},
      {"source megatron", "unknown source profile 'megatron'"},
      {"head lm_head.weight", "head wants a symbol 'tie'"},
  };
  for (const Case& one : cases) {
    CAPTURE(one.line);
    const std::string message = ErrorOf(kHeader + one.line + "\nb -> & : rep\n");
    // A whole-file check reports the last line.
    const std::string line = one.line.starts_with("head") ? "7" : "6";
    CHECK(message.starts_with("dir/x.rules:" + line + ": "));
    CHECK(message.find(one.message) != std::string::npos);
  }
}

TEST_CASE("an incomplete file is refused") {
  CHECK(ErrorOf("").find("declares no architecture") != std::string::npos);
  CHECK(ErrorOf("architecture A\n").find("declares no engine profile") != std::string::npos);
  CHECK(ErrorOf(kHeader).find("has no rule") != std::string::npos);
  CHECK(ErrorOf("alias A\n").find("dir/x.rules:1: alias before") == 0);
}

TEST_CASE("comments, blank lines and line ends of other systems are no content") {
  const std::string text = fmt::format(
      "# a comment\r\n\r\n{}a.#l.w -> & : rep  # not a capture\n  # indented\n", kHeader);
  const auto file = RuleFile::Parse(text, "embedded:llama");
  REQUIRE(file.ok());
  CHECK(file->name == "llama");
  REQUIRE(file->rules.size() == 1);
  CHECK(file->rules[0].pattern.integer_names() == std::vector<std::string>{"#l"});
}

TEST_CASE("arbitrary bytes never crash the parser") {
  uint64_t state = 42;
  const std::string alphabet = "a#l.(|)*$1->& :,=if gqa.merge col T\n\\\"\x80";
  for (int round = 0; round < 3000; ++round) {
    std::string text = kHeader;
    for (int i = 0; i < 60; ++i) {
      state = state * 6364136223846793005ULL + 1442695040888963407ULL;
      text += alphabet[(state >> 33) % alphabet.size()];
    }
    const auto file = RuleFile::Parse(text, "x");
    if (!file.ok()) CHECK(Message(file.status()).starts_with("x:"));
  }
}

TEST_CASE("an expression nested without end is refused") {
  CHECK(ErrorOf(kHeader + ("symbol q = " + std::string(100'000, '(')) + "1\n")
            .find("nested deeper") != std::string::npos);
}

}  // namespace
}  // namespace weightd
