// Traces of an engine's own loader: bound to the trainer's tensors by name, or refused by name.
#include "daemon/layout/traced_layout.h"

#include <catch2/catch.hpp>

namespace weightd {
namespace {

constexpr DType kFloat = DType::kFloat32;

/// [begin, begin + rows) of source `tensor` into the first rows of parameter `param`, columns and
/// all.
Write Rows(uint32_t tensor, uint32_t param, int64_t begin, int64_t rows, int64_t columns) {
  Write write;
  write.tensor = tensor;
  write.param = param;
  write.source = {{begin, 0}, {rows, columns}};
  write.target = {{0, 0}, {rows, columns}};
  write.source_dim[0] = 0;
  write.source_dim[1] = 1;
  return write;
}

const std::vector<TracedSource> kSources = {{.name = "q", .shape = {4, 3}},
                                            {.name = "mask", .shape = {7}}};
const std::vector<ParamInfo> kParams = {{.name = "p", .shape = {2, 3}, .dtype = kFloat}};

std::shared_ptr<const TracedLayout> Trace(int64_t begin) {
  auto trace = TracedLayout::Create(kSources, {Rows(0, 0, begin, 2, 3)}, 1);
  REQUIRE(trace.ok());
  return *trace;
}

std::string Reason(const Status& status) { return FieldsOf(status).reason; }
std::string Tensor(const Status& status) { return FieldsOf(status).tensor; }

TEST_CASE("a trace is lowered to the trainer's own numbering of its tensors") {
  const TensorTable table = {{"mask", {7}, kFloat}, {"q", {4, 3}, DType::kBFloat16}};
  TraceBinder binder(table);
  for (int rank : {0, 1}) {
    const EngineCoordinates at{.tp_rank = rank, .tp_size = 2};
    const auto layout = binder.Lower(*Trace(2 * rank), at, kParams);
    REQUIRE(layout.ok());
    CHECK(layout->coordinates == at);
    CHECK(layout->params == kParams);
    CHECK(layout->writes == std::vector<Write>{Rows(1, 0, 2 * rank, 2, 3)});
  }
  CHECK(*binder.Skipped() == std::vector<uint32_t>{0});
}

TEST_CASE("a source that one rank leaves out and another uses is not skipped") {
  const TensorTable table = {{"q", {4, 3}, kFloat}, {"mask", {7}, kFloat}};
  TraceBinder binder(table);
  Write zeros;
  zeros.zero_fill = true;
  zeros.target = {{0, 0}, {2, 3}};
  const auto nothing = TracedLayout::Create(kSources, {zeros}, 1);
  REQUIRE(nothing.ok());
  REQUIRE(binder.Lower(*Trace(0), {}, kParams).ok());
  REQUIRE(binder.Lower(**nothing, {}, kParams).ok());
  CHECK(*binder.Skipped() == std::vector<uint32_t>{1});
}

TEST_CASE("tensors that trainer and trace do not share are refused by name") {
  SECTION("the loader places one that the trainer lacks") {
    const TensorTable table = {{"mask", {7}, kFloat}};
    TraceBinder binder(table);
    const Status status = binder.Lower(*Trace(0), {}, kParams).status();
    CHECK(Reason(status) == reason::kMissingTensor);
    CHECK(Tensor(status) == "q");
  }
  SECTION("a tensor has another shape") {
    const TensorTable table = {{"q", {4, 4}, kFloat}};
    TraceBinder binder(table);
    const Status status = binder.Lower(*Trace(0), {}, kParams).status();
    CHECK(Reason(status) == reason::kShape);
    CHECK(Tensor(status) == "q");
    CHECK(Message(status).find("traced=[4, 3] trainer=[4, 4]") != std::string::npos);
  }
  SECTION("the trainer has one that the loader never saw") {
    const TensorTable table = {{"q", {4, 3}, kFloat}, {"masks", {7}, kFloat}};
    TraceBinder binder(table);
    REQUIRE(binder.Lower(*Trace(0), {}, kParams).ok());
    const Status status = binder.Skipped().status();
    CHECK(Reason(status) == reason::kUnknownTensor);
    CHECK(Tensor(status) == "masks");
    CHECK(Message(status).find("nearest traced: mask") != std::string::npos);
  }
  SECTION("the loader left one out that the trainer lacks as well") {
    const TensorTable table = {{"q", {4, 3}, kFloat}};
    TraceBinder binder(table);
    CHECK(binder.Lower(*Trace(0), {}, kParams).ok());
    CHECK(binder.Skipped()->empty());
  }
}

TEST_CASE("a trace that does not fit itself is refused") {
  CHECK(Reason(TracedLayout::Create(kSources, {Rows(2, 0, 0, 2, 3)}, 1).status()) ==
        reason::kProtocol);
  CHECK(Reason(TracedLayout::Create(kSources, {Rows(0, 1, 0, 2, 3)}, 1).status()) ==
        reason::kProtocol);
  const Status twice = TracedLayout::Create({kSources[0], kSources[0]}, {}, 1).status();
  CHECK(Reason(twice) == reason::kDuplicateTensor);
  CHECK(Tensor(twice) == "q");
}

TEST_CASE("the digest tells traces apart") {
  CHECK(Trace(0)->digest() == Trace(0)->digest());
  CHECK(Trace(0)->digest() != Trace(1)->digest());
  Write swapped = Rows(0, 0, 0, 2, 3);
  std::swap(swapped.source_dim[0], swapped.source_dim[1]);
  const auto other = TracedLayout::Create(kSources, {swapped}, 1);
  CHECK((*other)->digest() != Trace(0)->digest());
  const auto fewer = TracedLayout::Create({kSources[0]}, {Rows(0, 0, 0, 2, 3)}, 1);
  CHECK((*fewer)->digest() != Trace(0)->digest());
}

}  // namespace
}  // namespace weightd
