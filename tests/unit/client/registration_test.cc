#include "client/src/registration.h"

#include <sys/resource.h>

#include <catch2/catch.hpp>
#include <numeric>

#include "client/src/pages.h"
#include "daemon/base/version.h"
#include "daemon/layout/table_digest.h"
#include "daemon/wire/convert.h"
#include "tests/unit/client/client_testing.h"

namespace weightd {
namespace {

using testing::SharedFloats;
using testing::TensorOf;

weightd_param ParamOf(const char* name, int64_t size, weightd_memory memory) {
  weightd_param param{};
  param.name = name;
  param.dtype = 1;
  param.num_dims = 1;
  param.shape[0] = size;
  param.kind = 1;
  param.memory = memory;
  return param;
}

/// One write of [2, 3] from rows 1 and 2 of "q" [4, 3], transposed, into parameter 0.
struct TraceOf {
  weightd_traced_source source{.name = "q", .num_dims = 2, .shape = {4, 3}};
  weightd_traced_write write{
      .param = 0, .source = 0, .extent = {3, 2}, .source_origin = {1, 0}, .source_dim = {1, 0}};
  std::vector<ParamInfo> params = {{.name = "p", .shape = {3, 2}, .dtype = DType::kFloat32}};

  StatusOr<std::shared_ptr<const TracedLayout>> Read() const {
    return ReadTrace({&source, 1, &write, 1, 0}, params);
  }
};

}  // namespace

TEST_CASE("boxes and shared memory objects that recur are kept once") {
  const SharedFloats memory(64);
  const TensorOf a("a", {8, 4}, 4, 2, memory.Memory(0, {4, 1}));
  const TensorOf b("b", {8, 4}, 4, 2, memory.Memory(8, {4, 1}));
  const TensorOf empty("c", {8, 4}, 8, 0, memory.Memory(0, {4, 1}));
  const weightd_tensor tensors[] = {a.View(), b.View(), empty.View()};
  const auto read = ReadTensors(tensors);
  REQUIRE(read.ok());
  CHECK(read->shards.boxes == std::vector<Box>{{{4, 0}, {2, 4}}});
  CHECK(read->shards.box_index == std::vector<uint32_t>{0, 0});
  CHECK(read->shards.first == std::vector<uint32_t>{0, 1, 2, 2});
  CHECK(read->caller_shard == std::vector<int64_t>{0, 1, -1});
  CHECK(read->segments.segments().size() == 1);
  CHECK(read->memory[1].offset_bytes == 32);
  CHECK_FALSE(read->staged);
}

TEST_CASE("GPU memory is refused by name where the process uses no GPU") {
  if (cuda::LoadedDriver() != nullptr) return;  // a process that does; see tests/gpu/mapping
  const SharedFloats memory(16);
  weightd_memory gpu = memory.Memory();
  gpu.space = WEIGHTD_SPACE_CUDA;
  gpu.fd = -1;
  gpu.address = reinterpret_cast<const void*>(0x7f0000000000);
  const TensorOf tensor("w", {8}, 0, 8, gpu);
  const weightd_tensor tensors[] = {tensor.View()};
  const Status refused = ReadTensors(tensors).status();
  CHECK(FieldsOf(refused).reason == reason::kDevice);
  CHECK(FieldsOf(refused).tensor == "w");
  const weightd_param params[] = {ParamOf("p", 8, gpu)};
  CHECK(FieldsOf(ReadParams(params).status()).tensor == "p");
}

TEST_CASE("registration refuses what cannot be right and names the tensor") {
  const SharedFloats memory(16);
  TensorOf good("good", {8}, 0, 8, memory.Memory());
  TensorOf bad("bad", {8}, 0, 8, memory.Memory());
  weightd_tensor tensors[] = {good.View(), bad.View()};
  std::string reason;
  SECTION("a name twice") {
    tensors[1].name = "good";
    reason = reason::kDuplicateTensor;
  }
  SECTION("no name") {
    tensors[1].name = "";
    reason = reason::kShape;
  }
  SECTION("a box outside the shape") {
    bad.shard.origin[0] = 1;
    reason = reason::kShape;
  }
  SECTION("an unknown dtype") {
    tensors[1].dtype = 13;
    reason = reason::kDtype;
  }
  SECTION("an object that is too small") {
    bad.shard.memory.offset_bytes = 36;
    reason = reason::kSharedMemory;
  }
  SECTION("strides that leave the object") {
    bad.shard.memory.strides[0] = 3;
    reason = reason::kSharedMemory;
  }
  SECTION("negative strides") {
    bad.shard.memory.strides[0] = -1;
    reason = reason::kShape;
  }
  SECTION("a descriptor that is not open") {
    bad.shard.memory.fd = 1 << 20;
    reason = reason::kSharedMemory;
  }
  const auto read = ReadTensors(tensors);
  REQUIRE_FALSE(read.ok());
  const ErrorFields fields = FieldsOf(read.status());
  CHECK(read.status().code() == StatusCode::kInvalidArgument);
  CHECK(fields.reason == reason);
  CHECK_FALSE(fields.remedy.empty());
  if (std::string(tensors[1].name) != "") CHECK(fields.tensor == tensors[1].name);
}

TEST_CASE("a parameter must be lent unless it is opaque or an alias") {
  const SharedFloats memory(16);
  weightd_memory nothing{};
  nothing.fd = -1;
  weightd_param params[] = {ParamOf("weight", 8, memory.Memory()), ParamOf("head", 8, nothing)};
  REQUIRE_FALSE(ReadParams(params).ok());
  CHECK(FieldsOf(ReadParams(params).status()).tensor == "head");
  params[1].alias_of = "weight";
  const auto aliased = ReadParams(params);
  REQUIRE(aliased.ok());
  CHECK(aliased->params[1].alias_of == "weight");
  CHECK(EngineBindings(*aliased)[0].bindings_size() == 1);
  params[1].alias_of = "nowhere";
  CHECK(FieldsOf(ReadParams(params).status()).reason == reason::kUnknownTensor);
  params[1].alias_of = nullptr;
  params[1].kind = 3;
  CHECK(ReadParams(params).ok());
}

TEST_CASE("a parameter whose elements share memory is refused") {
  const SharedFloats memory(16);
  const weightd_param params[] = {ParamOf("weight", 8, memory.Memory(0, {0}))};
  CHECK(FieldsOf(ReadParams(params).status()).reason == reason::kShape);
}

TEST_CASE("the soft limit of open files is raised, and a hard limit that is too low is named") {
  rlimit before{};
  REQUIRE(::getrlimit(RLIMIT_NOFILE, &before) == 0);
  rlimit low = before;
  low.rlim_cur = 100;
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &low) == 0);
  REQUIRE(EnsureDescriptors(200).ok());
  rlimit after{};
  REQUIRE(::getrlimit(RLIMIT_NOFILE, &after) == 0);
  CHECK(after.rlim_cur >= 200);
  if (before.rlim_max != RLIM_INFINITY) {
    const Status refused = EnsureDescriptors(before.rlim_max);
    CHECK(refused.code() == StatusCode::kResourceExhausted);
    CHECK(FieldsOf(refused).reason == reason::kFileDescriptors);
  }
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &before) == 0);
}

TEST_CASE("pages stay below their limit and put together are the registration") {
  ActorRegistration registration;
  RankShards& shards = registration.shards;
  constexpr uint32_t kTensors = 60'000;
  for (uint32_t t = 0; t < kTensors; ++t) {
    registration.table.push_back(
        {"model.layers.weight." + std::to_string(t), {int64_t{t} + 1, 64}, DType::kFloat32});
    shards.first.push_back(t);
    shards.box_index.push_back(t);
    shards.boxes.push_back({{t, 0}, {1, 64}});
    registration.memory.push_back({uint32_t{0}, uint64_t{t} * 256, nullptr, {64, 1}});
  }
  shards.first.push_back(kTensors);

  std::vector<v1::Box> boxes;
  std::vector<uint32_t> index;
  uint32_t tensors = 0;
  const auto pages = ShardsPages(shards);
  for (const v1::ShardsPage& page : pages) {
    CHECK(page.ByteSizeLong() < kPageBytes);
    CHECK(page.last() == (&page == &pages.back()));
    boxes.insert(boxes.end(), page.boxes().begin(), page.boxes().end());
    for (uint32_t count : page.boxes_per_tensor()) {
      tensors += 1;
      REQUIRE(count == 1);
    }
    for (uint32_t i : page.box_index()) {
      REQUIRE(i < boxes.size());  // never ahead of its box
      index.push_back(i);
    }
  }
  CHECK(pages.size() > 1);
  CHECK(tensors == kTensors);
  CHECK(index == shards.box_index);
  size_t named = 0;
  for (const v1::TensorTablePage& page : TablePages(registration.table)) {
    CHECK(page.ByteSizeLong() < kPageBytes);
    named += static_cast<size_t>(page.tensors_size());
  }
  CHECK(named == kTensors);
  size_t bound = 0;
  for (const v1::BindMemory& page : ActorBindings(registration)) {
    CHECK(page.ByteSizeLong() < kPageBytes);
    bound += static_cast<size_t>(page.bindings_size());
  }
  CHECK(bound == kTensors);
}

TEST_CASE("the table's digest depends on names, shapes, dtypes and their order") {
  const TensorTable table = {{"a", {2, 3}, DType::kFloat32}, {"b", {4}, DType::kBFloat16}};
  const auto digest = CanonicalTableDigest(table);
  CHECK(digest == CanonicalTableDigest(TensorTable(table)));
  TensorTable other = table;
  SECTION("name") { other[0].name = "c"; }
  SECTION("shape") { other[0].shape = {3, 2}; }
  SECTION("dtype") { other[1].dtype = DType::kFloat16; }
  SECTION("order") { std::swap(other[0], other[1]); }
  SECTION("length") { other.pop_back(); }
  CHECK(digest != CanonicalTableDigest(other));
}

TEST_CASE("a trace keeps its blocks, and travels in pages") {
  const TraceOf trace;
  const auto read = trace.Read();
  REQUIRE(read.ok());
  const Write& write = (*read)->writes().at(0);
  CHECK(write.source == Box{{1, 0}, {2, 3}});
  CHECK(write.target == Box{{0, 0}, {3, 2}});
  CHECK((*read)->sources().at(0).used);
  const std::vector<v1::TracePage> pages = TracePages(**read);
  REQUIRE(pages.size() == 1);
  CHECK(pages[0].sources(0).name() == "q");
  const auto back = FromProto(pages[0].writes(0));
  REQUIRE(back.ok());
  CHECK(*back == write);
}

TEST_CASE("a trace that leaves its tensors is refused and named") {
  TraceOf trace;
  const auto refusal = [&trace](const char* reason, const char* tensor) {
    const Status status = trace.Read().status();
    INFO(Message(status));
    CHECK(FieldsOf(status).reason == reason);
    CHECK(FieldsOf(status).tensor == tensor);
  };
  SECTION("target") {
    trace.write.target_origin[1] = 1;
    refusal(reason::kShape, "p");
  }
  SECTION("source") {
    trace.write.source_origin[0] = 3;
    refusal(reason::kShape, "q");
  }
  SECTION("dimension") {
    trace.write.source_dim[0] = 2;
    refusal(reason::kShape, "p");
  }
  SECTION("a wide dimension that follows none") {
    trace.write.source_dim[0] = -1;
    refusal(reason::kShape, "p");
  }
  SECTION("parameter") {
    trace.write.param = 1;
    refusal(reason::kProtocol, "");
  }
  SECTION("tensor") {
    trace.write.source = 1;
    refusal(reason::kProtocol, "");
  }
  SECTION("shape") {
    trace.source.shape[0] = -4;
    refusal(reason::kShape, "q");
  }
}

}  // namespace weightd
