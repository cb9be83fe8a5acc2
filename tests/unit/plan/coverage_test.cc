#include <catch2/catch.hpp>

#include "tests/unit/plan/plan_testing.h"

namespace weightd {
namespace {

using testing::MakeBox;
using testing::ReasonOf;
using testing::StraightWrite;
using testing::ZeroFill;

const TensorTable kTable = {{"a", {4, 6}, DType::kFloat32}, {"b", {4, 6}, DType::kInt32}};

/// One parameter made of the upper half of tensor a and zero fill.
RankLayout Covered() {
  RankLayout layout;
  layout.params.push_back({"w", {4, 6}, DType::kBFloat16});
  layout.writes = {StraightWrite(0, 0, MakeBox({0, 0}, {2, 6}), MakeBox({0, 0}, {2, 6})),
                   ZeroFill(0, MakeBox({2, 0}, {2, 6}))};
  return layout;
}

void CheckRefused(const RankLayout& layout, const char* reason) {
  const Status status = CheckCoverage(kTable, layout);
  CHECK(ReasonOf(status) == reason);
  CHECK(status.code() == StatusCode::kInvalidArgument);
  CHECK(FieldsOf(status).tensor == "w");
  CHECK_FALSE(FieldsOf(status).remedy.empty());
}

TEST_CASE("a parameter that is written once everywhere is proven") {
  CHECK(CheckCoverage(kTable, Covered()).ok());
}

TEST_CASE("a missing part is an uncovered parameter, named with its box") {
  RankLayout layout = Covered();
  layout.writes.pop_back();
  CheckRefused(layout, reason::kUncoveredParameter);
  CHECK_THAT(Message(CheckCoverage(kTable, layout)), Catch::Contains("box=[2:4, 0:6]"));
  layout.writes.clear();
  CheckRefused(layout, reason::kUncoveredParameter);
}

TEST_CASE("an element that is written twice is an overlap") {
  RankLayout layout = Covered();
  layout.writes[1].target = MakeBox({1, 0}, {2, 6});
  CheckRefused(layout, reason::kOverlap);
}

TEST_CASE("blocks that leave their tensors are refused") {
  RankLayout layout = Covered();
  SECTION("target") { layout.writes[1].target = MakeBox({3, 0}, {2, 6}); }
  SECTION("source") { layout.writes[0].source = MakeBox({3, 0}, {2, 6}); }
  SECTION("negative") { layout.writes[0].source = MakeBox({-1, 0}, {2, 6}); }
  SECTION("dimensions of the target") { layout.writes[1].target = MakeBox({12}, {12}); }
  SECTION("dimensions of the source") { layout.writes[0].source = MakeBox({0}, {12}); }
  SECTION("extents") { layout.writes[0].source = MakeBox({0, 0}, {2, 5}); }
  SECTION("one source dimension twice") { layout.writes[0].source_dim = {0, 0}; }
  SECTION("unknown source dimension") { layout.writes[0].source_dim = {0, 2}; }
  SECTION("source dimension below -1") { layout.writes[0].source_dim = {-2, 1}; }
  CheckRefused(layout, reason::kShape);
}

TEST_CASE("a source dimension that nothing follows must be single") {
  RankLayout layout;
  layout.params.push_back({"w", {6}, DType::kFloat32});
  layout.writes = {{0, 0, false, {1}, MakeBox({2, 0}, {1, 6}), MakeBox({0}, {6})}};
  CHECK(CheckCoverage(kTable, layout).ok());
  layout.writes[0].source = MakeBox({2, 0}, {2, 6});
  CheckRefused(layout, reason::kShape);
}

TEST_CASE("dtypes that cannot be cast are refused") {
  RankLayout layout = Covered();
  layout.writes[0].tensor = 1;
  CheckRefused(layout, reason::kDtype);
}

TEST_CASE("8-bit floats are neither made nor taken apart") {
  for (const DType eight : {DType::kFloat8E4M3FN, DType::kFloat8E5M2}) {
    for (const DType other : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt8,
                              DType::kFloat8E4M3FN, DType::kFloat8E5M2}) {
      for (const auto& [from, to] : {std::pair(eight, other), std::pair(other, eight)}) {
        const TensorTable table{{"w", {2, 2}, from}};
        RankLayout layout;
        layout.params.push_back({"p", {2, 2}, to});
        layout.writes.push_back(
            {0, 0, false, {0, 1}, MakeBox({0, 0}, {2, 2}), MakeBox({0, 0}, {2, 2})});
        const Status status = CheckCoverage(table, layout);
        INFO(Name(from) << " to " << Name(to));
        CHECK(status.ok() == (from == to));
        if (from != to) CHECK(FieldsOf(status).reason == reason::kDtype);
        if (from != to) CHECK(FieldsOf(status).tensor == "p");
      }
    }
  }
}

TEST_CASE("a write of an unknown tensor or parameter is refused") {
  RankLayout layout = Covered();
  layout.writes[0].tensor = 2;
  CheckRefused(layout, reason::kUnknownTensor);
  layout = Covered();
  layout.writes[0].param = 1;
  CHECK(ReasonOf(CheckCoverage(kTable, layout)) == reason::kShape);
}

TEST_CASE("aliased and opaque parameters are left alone") {
  RankLayout layout = Covered();
  layout.params[0].kind = ParamKind::kOpaque;
  CheckRefused(layout, reason::kOverlap);
  layout.params[0].kind = ParamKind::kDerived;
  CHECK(CheckCoverage(kTable, layout).ok());
  layout.params[0].alias_of = "v";
  CheckRefused(layout, reason::kOverlap);
  layout.writes.clear();
  CHECK(CheckCoverage(kTable, layout).ok());
}

TEST_CASE("parameters without elements need no writes") {
  RankLayout layout;
  layout.params.push_back({"w", {0, 6}, DType::kFloat32});
  CHECK(CheckCoverage(kTable, layout).ok());
}

TEST_CASE("source elements that no rank reads are refused unless skipped") {
  RankLayout left = Covered();
  RankLayout right = Covered();
  right.writes[0].source = MakeBox({2, 0}, {2, 6});
  const std::vector<const RankLayout*> one = {&left};
  const std::vector<const RankLayout*> both = {&left, &right, &left};
  const std::vector<uint32_t> skip_b = {1};
  const std::vector<uint32_t> skip_all = {0, 1};
  CHECK(CheckSourcesUsed(kTable, both, skip_b).ok());
  CHECK(CheckSourcesUsed(kTable, {}, skip_all).ok());
  const Status unread = CheckSourcesUsed(kTable, both, {});
  CHECK(ReasonOf(unread) == reason::kUnknownTensor);
  CHECK(FieldsOf(unread).tensor == "b");
  const Status partly = CheckSourcesUsed(kTable, one, skip_b);
  CHECK(FieldsOf(partly).tensor == "a");
  CHECK_THAT(Message(partly), Catch::Contains("[2:4, 0:6]"));
}

}  // namespace
}  // namespace weightd
