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

}  // namespace weightd
