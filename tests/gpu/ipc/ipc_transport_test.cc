// The ipc transport on one GPU, against what the host transport makes of the same plan.
#define CATCH_CONFIG_RUNNER
#include "daemon/transport/ipc/ipc_transport.h"

#include <catch2/catch.hpp>
#include <cstdio>
#include <list>
#include <vector>

#include "daemon/device/cuda/buffer.h"
#include "daemon/device/cuda/device.h"
#include "daemon/transport/shm/shm_transport.h"
#include "tests/unit/transport/plan_fixture.h"

namespace weightd {
namespace {

using testing::PlanFixture;

constexpr cuda::DeviceId kDevice{0};

/// Merged rows, a transpose, a column slice, zero fill: what loaders make.
void Describe(PlanFixture* fixture) {
  const uint32_t q = fixture->AddTensor("q", {64, 96});
  const uint32_t k = fixture->AddTensor("k", {30, 96});
  const uint32_t t = fixture->AddTensor("t", {50, 70});
  const uint32_t large = fixture->AddTensor("large", {1000, 2048});
  const uint32_t qk = fixture->AddParam("qk", {96, 96});
  fixture->AddWrite(q, WholeBox({64, 96}), qk, {0, 0}, {0, 1});
  fixture->AddWrite(k, WholeBox({30, 96}), qk, {64, 0}, {0, 1});
  fixture->AddZeroFill(qk, {{94, 0}, {2, 96}});
  const uint32_t turned = fixture->AddParam("turned", {70, 50}, ParamKind::kDerived);
  fixture->AddWrite(t, WholeBox({50, 70}), turned, {0, 0}, {1, 0});
  const uint32_t slice = fixture->AddParam("slice", {1000, 1024});
  fixture->AddWrite(large, {{0, 1024}, {1000, 1024}}, slice, {0, 0}, {0, 1});
  fixture->Finish(3);
}

/// The plan of a fixture, bound to copies of its memory on the GPU.
class OnGpu {
 public:
  explicit OnGpu(PlanFixture* fixture) : fixture_(fixture) {
    auto stream = cuda::Stream::Create(kDevice);
    REQUIRE(stream.ok());
    stream_ = *std::move(stream);
    plan_ = fixture->plan();
    for (uint32_t r = 0; r < fixture->num_ranks(); ++r) {
      for (uint32_t t = 0; t < plan_.sources[r].size(); ++t) {
        Move(&plan_.sources[r][t], fixture->shard_memory(r, t));
      }
    }
    for (size_t p = 0; p < fixture->params().size(); ++p) {
      Move(&plan_.targets[0].params[p], fixture->params()[p]);
    }
    REQUIRE(stream_.Synchronize().ok());
  }
  BoundPlan& plan() { return plan_; }
  std::vector<std::vector<uint16_t>> Params() {
    std::vector<std::vector<uint16_t>> all = fixture_->params();
    for (size_t p = 0; p < all.size(); ++p) {
      const std::byte* base = plan_.targets[0].params[p].base;
      for (const cuda::DeviceBuffer& buffer : buffers_) {
        if (buffer.data() != base) continue;
        REQUIRE(buffer.Download(all[p].data(), all[p].size() * 2, 0, stream_.ref()).ok());
      }
    }
    REQUIRE(stream_.Synchronize().ok());
    return all;
  }

 private:
  template <typename T>
  void Move(Binding* binding, const std::vector<T>& content) {
    auto buffer = cuda::DeviceBuffer::Create(kDevice, content.size() * sizeof(T));
    REQUIRE(buffer.ok());
    REQUIRE(buffer->Upload(content.data(), content.size() * sizeof(T), 0, stream_.ref()).ok());
    binding->base = binding->segment = buffer->data();
    binding->segment_bytes = buffer->size_bytes();
    buffers_.push_back(*std::move(buffer));
  }

  PlanFixture* fixture_;
  cuda::Stream stream_;
  BoundPlan plan_;
  std::list<cuda::DeviceBuffer> buffers_;
};

std::unique_ptr<IpcTransport> MakeTransport(const IpcOptions& options = {}) {
  auto transport = IpcTransport::Create(kDevice, options);
  INFO(Message(transport.status()));
  REQUIRE(transport.ok());
  return *std::move(transport);
}

TEST_CASE("bytes and digests equal the host transport's", "[gpu]") {
  PlanFixture fixture(3);
  Describe(&fixture);
  OnGpu gpu(&fixture);
  const auto transport = MakeTransport();
  ShmTransport host({.num_threads = 1});
  RunControl control;
  const auto wanted = host.Transfer(fixture.plan(), 0, control);
  const auto sent = transport->Transfer(gpu.plan(), 0, control);
  INFO(Message(sent.status()));
  REQUIRE((wanted.ok() && sent.ok()));
  CHECK(*sent == *wanted);
  CHECK(gpu.Params() == fixture.Expected());
  const auto verified = transport->Verify(gpu.plan(), 0, control);
  INFO(Message(verified.status()));
  REQUIRE(verified.ok());
  CHECK(*verified == *wanted);
  for (uint32_t rank = 0; rank < 3; ++rank) {
    CHECK(*transport->DigestShard(gpu.plan(), rank, 2, 0, control) ==
          *host.DigestShard(fixture.plan(), rank, 2, 0, control));
  }
}

TEST_CASE("the copy engine lands the same bytes under the same digests", "[gpu]") {
  PlanFixture fixture(2);
  const uint32_t whole = fixture.AddTensor("whole", {512, 4096});
  const uint32_t wide = fixture.AddTensor("wide", {512, 8192});
  const uint32_t param = fixture.AddParam("param", {1024, 4096});
  fixture.AddWrite(whole, WholeBox({512, 4096}), param, {0, 0}, {0, 1});
  fixture.AddWrite(wide, {{0, 4096}, {512, 4096}}, param, {512, 0}, {0, 1});
  fixture.Finish(2);
  // The same memory read as bfloat16, so that nothing is cast.
  TensorTable table = *fixture.plan().table;
  for (TensorInfo& tensor : table) tensor.dtype = DType::kBFloat16;
  fixture.plan().table = &table;
  OnGpu gpu(&fixture);
  RunControl control;
  ShmTransport host({.num_threads = 1});
  const auto wanted = host.Transfer(fixture.plan(), 0, control);
  REQUIRE(wanted.ok());
  const auto transport = MakeTransport({.copy_engine = IpcOptions::CopyEngine::kAlways});
  const auto sent = transport->Transfer(gpu.plan(), 0, control);
  INFO(Message(sent.status()));
  REQUIRE(sent.ok());
  CHECK(*sent == *wanted);
  CHECK(gpu.Params() == fixture.params());
  CHECK(*transport->Verify(gpu.plan(), 0, control) == *wanted);
}

TEST_CASE("engine ranks here and on a peer are written side by side", "[gpu]") {
  PlanFixture fixture(2);
  Describe(&fixture);
  OnGpu here(&fixture);
  OnGpu there(&fixture);  // a peer's memory, as far as the transport is told
  BoundPlan plan = here.plan();
  plan.targets.push_back(there.plan().targets[0]);
  plan.targets[1].remote = true;
  const auto transport = MakeTransport({.group_bytes = 1 << 20});
  uint32_t windows = 0;
  uint64_t bytes = 0;
  RunControl control;
  control.on_window = [&](uint32_t done, uint64_t landed, const std::string&) {
    CHECK(done == ++windows);
    CHECK(landed >= bytes);
    bytes = landed;
  };
  const std::vector<uint32_t> targets = {0, 1};
  const auto sent = transport->TransferAll(plan, targets, control);
  INFO(Message(sent.status()));
  REQUIRE(sent.ok());
  CHECK(windows == 2 * plan.targets[0].plan->windows.size());
  CHECK(bytes == 2 * plan.targets[0].plan->bytes);
  CHECK((*sent)[0] == (*sent)[1]);
  CHECK(here.Params() == fixture.Expected());
  CHECK(there.Params() == fixture.Expected());
}

TEST_CASE("a changed element of the engine's memory changes its digest", "[gpu]") {
  PlanFixture fixture(1);
  Describe(&fixture);
  OnGpu gpu(&fixture);
  const auto transport = MakeTransport();
  RunControl control;
  const auto sent = transport->Transfer(gpu.plan(), 0, control);
  fixture.shard_memory(0, 0)[17] ^= 0x10000;
  OnGpu other(&fixture);
  const auto resent = transport->Transfer(other.plan(), 0, control);
  REQUIRE((sent.ok() && resent.ok()));
  CHECK(sent->words[0] != resent->words[0]);
  CHECK(*transport->Verify(gpu.plan(), 0, control) == *sent);
  CHECK(*transport->Verify(other.plan(), 0, control) == *resent);
}

TEST_CASE("a table is uploaded once for a plan and its registrations", "[gpu]") {
  PlanFixture fixture(2);
  Describe(&fixture);
  OnGpu gpu(&fixture);
  const auto transport = MakeTransport();
  RunControl control;
  gpu.plan().id = 7;
  gpu.plan().registrations = {1, 2};
  gpu.plan().targets[0].registration = 3;
  const auto first = transport->Transfer(gpu.plan(), 0, control);
  const uint64_t bytes = transport->table_bytes();
  CHECK(bytes > 0);
  const auto again = transport->Transfer(gpu.plan(), 0, control);
  CHECK(transport->table_bytes() == bytes);
  REQUIRE((first.ok() && again.ok()));
  CHECK(*first == *again);
  // Memory that was registered anew lies elsewhere.
  OnGpu moved(&fixture);
  moved.plan().id = 7;
  moved.plan().registrations = {1, 4};
  moved.plan().targets[0].registration = 5;
  CHECK(*transport->Transfer(moved.plan(), 0, control) == *first);
  CHECK(moved.Params() == fixture.Expected());
}

TEST_CASE("tables that do not fit make room for each other", "[gpu]") {
  PlanFixture fixture(2);
  Describe(&fixture);
  OnGpu gpu(&fixture);
  const auto transport = MakeTransport({.table_bytes = 1});
  RunControl control;
  for (uint64_t id = 1; id < 5; ++id) {
    gpu.plan().id = id;
    REQUIRE(transport->Transfer(gpu.plan(), 0, control).ok());
  }
  CHECK(transport->table_bytes() < 1u << 20);
}

TEST_CASE("windows are reported in order, and cancelling ends the step", "[gpu]") {
  PlanFixture fixture(3);
  Describe(&fixture);
  OnGpu gpu(&fixture);
  const auto transport = MakeTransport({.group_bytes = 1});
  std::atomic<bool> cancelled{false};
  std::vector<uint32_t> seen;
  RunControl control;
  control.cancelled = &cancelled;
  control.on_window = [&](uint32_t windows, uint64_t, const std::string&) {
    seen.push_back(windows);
  };
  REQUIRE(transport->Transfer(gpu.plan(), 0, control).ok());
  const size_t total = gpu.plan().targets[0].plan->windows.size();
  CHECK(seen.size() == total);
  CHECK(std::is_sorted(seen.begin(), seen.end()));
  control.on_window = [&](uint32_t, uint64_t, const std::string&) { cancelled = true; };
  const Status ended = transport->Transfer(gpu.plan(), 0, control).status();
  CHECK(ended.code() == StatusCode::kCancelled);
  cancelled = false;
  control.on_window = nullptr;
  control.deadline = Clock::now() - milliseconds(1);
  CHECK(transport->Transfer(gpu.plan(), 0, control).status().code() ==
        StatusCode::kDeadlineExceeded);
  CHECK_FALSE(transport->broken());
}

TEST_CASE("a block outside of its segment is refused by name before anything is written", "[gpu]") {
  PlanFixture fixture(1);
  Describe(&fixture);
  OnGpu gpu(&fixture);
  const auto transport = MakeTransport();
  RunControl control;
  gpu.plan().targets[0].params[1].segment_bytes -= 2;
  const Status refused = transport->Transfer(gpu.plan(), 0, control).status();
  CHECK(FieldsOf(refused).reason == reason::kShape);
  CHECK(FieldsOf(refused).tensor == "turned");
  CHECK(gpu.Params() == fixture.params());
  gpu.plan().sources[0][0].staged = true;
  CHECK(FieldsOf(transport->Transfer(gpu.plan(), 0, control).status()).tensor == "q");
}

TEST_CASE("catch-up copies a peer's parameters and proves it", "[gpu]") {
  PlanFixture fixture(1);
  Describe(&fixture);
  OnGpu peer(&fixture);
  OnGpu late(&fixture);
  const auto transport = MakeTransport();
  RunControl control;
  REQUIRE(transport->Transfer(peer.plan(), 0, control).ok());
  const Status copied =
      transport->CopyParams(late.plan(), 0, peer.plan().targets[0].params, control);
  INFO(Message(copied));
  CHECK(copied.ok());
  CHECK(late.Params() == fixture.Expected());
}

}  // namespace
}  // namespace weightd

int main(int argc, char** argv) {
  const weightd::Status available = weightd::cuda::CheckAvailable();
  if (!available.ok()) {
    std::printf("skipped: %s\n", weightd::Message(available).c_str());
    return 77;
  }
  return Catch::Session().run(argc, argv);
}
