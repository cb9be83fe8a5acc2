#include "daemon/layout/stages.h"

#include <catch2/catch.hpp>
#include <vector>

namespace weightd {
namespace {

constexpr ParamKind kDerived = ParamKind::kDerived;

std::vector<ParamInfo> Params() {
  return {{"a", {4}, DType::kFloat32},
          {"b", {8}, DType::kFloat32, kDerived, "", 2},
          {"c", {4}, DType::kBFloat16, kDerived, "", 1},
          {"d", {6}, DType::kBFloat16, kDerived, "", 1},
          {"e", {4}, DType::kBFloat16, kDerived, "c", 1},
          {"f", {4}, DType::kFloat32, kDerived}};
}

std::string Refused(const std::vector<ParamInfo>& params) {
  const Status status = CheckStages(params);
  CHECK(status.code() == StatusCode::kInvalidArgument);
  CHECK(FieldsOf(status).reason == reason::kConfig);
  CHECK_FALSE(FieldsOf(status).remedy.empty());
  return FieldsOf(status).tensor;
}

}  // namespace

TEST_CASE("the largest stage is what a rank needs beside its parameters") {
  const std::vector<ParamInfo> params = Params();
  CHECK(CheckStages(params).ok());
  CHECK(NumStages(params) == 2);
  CHECK(StagedBytes(params) == 32);  // of b; c and d have 20, and e is c
  CHECK(StagedBytes(std::vector<ParamInfo>(params.begin() + 2, params.end())) == 20);
}

TEST_CASE("what is written in place comes with the first stage") {
  CHECK(NumRounds(0) == 1);
  CHECK(NumRounds(1) == 1);
  CHECK(NumRounds(3) == 3);
  const std::vector<ParamInfo> params = Params();
  CHECK(RoundOf(params[0]) == 0);
  CHECK(RoundOf(params[1]) == 1);
  CHECK(RoundOf(params[2]) == 0);
}

TEST_CASE("stages that cannot be are refused and named") {
  std::vector<ParamInfo> params = Params();
  SECTION("gap") {
    params[1].stage = 3;
    CHECK(Refused(params) == "b");
  }
  SECTION("no first") {
    params[2].stage = params[3].stage = params[4].stage = 2;
    CHECK(Refused(params) == "b");
  }
  SECTION("beyond any number of parameters") {
    params[1].stage = 0xffffffff;
    CHECK(Refused(params) == "b");
  }
  SECTION("raw") {
    params[0].stage = 1;
    CHECK(Refused(params) == "a");
  }
  SECTION("opaque") {
    params[3].kind = ParamKind::kOpaque;
    CHECK(Refused(params) == "d");
  }
  SECTION("alias elsewhere") {
    params[4].stage = 2;
    CHECK(Refused(params) == "e");
  }
}

namespace {

/// "p" of 5 rows comes in stages 1 to 3, two rows each; "q" with the last of them.
std::vector<ParamInfo> Pulled() {
  ParamInfo p{"p", {5, 4}, DType::kFloat32, ParamKind::kRaw, "", 1, true, 2};
  ParamInfo q{"q", {4}, DType::kFloat32, ParamKind::kRaw, "", 3, true};
  return {{"a", {4}, DType::kFloat32}, p, q};
}

}  // namespace

TEST_CASE("a pulled parameter comes in parts of so many rows, one stage each") {
  const std::vector<ParamInfo> params = Pulled();
  CHECK(CheckStages(params).ok());
  CHECK(NumStages(params) == 3);
  CHECK(StagedBytes(params) == 32);  // two rows of p, or the last of p and q
  const std::vector<ParamInfo> parts = PartsOf(params[1]);
  REQUIRE(parts.size() == 3);
  CHECK(parts[0].shape == Shape{2, 4});
  CHECK(parts[2].shape == Shape{1, 4});
  CHECK(parts[2].stage == 3);
  CHECK(CheckStages(SplitStages({{}, params, {}}).params).ok());
  CHECK(PartsOf(params[2]) == std::vector<ParamInfo>{params[2]});
}

TEST_CASE("writes are cut where parts meet, along whatever the rows follow") {
  RankLayout layout{{}, Pulled(), {}};
  // Rows 1 to 3 of p are columns 11 to 13 of tensor 7; its other rows are zeros.
  layout.writes = {
      {.tensor = 7,
       .param = 1,
       .source_dim = {1, 0},
       .source = {{20, 11}, {4, 3}},
       .target = {{1, 0}, {3, 4}}},
      {.param = 1, .zero_fill = true, .target = {{4, 0}, {1, 4}}},
      {.tensor = 8, .param = 2, .source_dim = {0}, .source = {{0}, {4}}, .target = {{0}, {4}}}};
  const RankLayout split = SplitStages(layout);
  REQUIRE(split.params.size() == 5);
  CHECK(split.params[4].name == "q");
  REQUIRE(split.writes.size() == 4);
  const Write& first = split.writes[0];
  CHECK(first.param == 1);
  CHECK(first.target == Box{{1, 0}, {1, 4}});
  CHECK(first.source == Box{{20, 11}, {4, 1}});
  const Write& second = split.writes[1];
  CHECK(second.param == 2);
  CHECK(second.target == Box{{0, 0}, {2, 4}});
  CHECK(second.source == Box{{20, 12}, {4, 2}});
  CHECK(split.writes[2].param == 3);
  CHECK(split.writes[2].target == Box{{0, 0}, {1, 4}});
  CHECK(split.writes[3].param == 4);
  CHECK(SplitStages({{}, Params(), {}}).params == Params());
}

TEST_CASE("pulled parameters that cannot be are refused and named") {
  std::vector<ParamInfo> params = Pulled();
  SECTION("without a stage") {
    params[2].stage = 0;
    CHECK(Refused(params) == "q");
  }
  SECTION("opaque") {
    params[2].kind = ParamKind::kOpaque;
    CHECK(Refused(params) == "q");
  }
  SECTION("parts of what is not pulled") {
    params[1].pulled = false;
    CHECK(Refused(params) == "p");
  }
  SECTION("a gap after the parts") {
    params[2].stage = 5;
    CHECK(Refused(params) == "q");
  }
  SECTION("too many parts of all together") {
    params[1].shape[0] = 1 << 17;
    params.resize(40, params[1]);
    CHECK(Refused(params) == "p");
  }
  SECTION("more parts than anybody has") {
    params[1].shape[0] = int64_t{1} << 60;
    CHECK(Refused(params) == "p");
  }
}

}  // namespace weightd
