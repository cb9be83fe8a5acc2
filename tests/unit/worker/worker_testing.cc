#include "tests/unit/worker/worker_testing.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <utility>

#include "daemon/wire/convert.h"

namespace weightd::testing {

std::string ReasonOf(const Status& status) { return FieldsOf(status).reason; }
std::string ReasonOf(const v1::ErrorDetail& detail) { return detail.reason(); }

TempDir::TempDir() {
  std::string pattern = std::filesystem::temp_directory_path() / "weightd-test-XXXXXX";
  WEIGHTD_CHECK(::mkdtemp(pattern.data()) != nullptr);
  dir_ = pattern;
}

TempDir::~TempDir() { std::filesystem::remove_all(dir_); }

SharedBuffer::SharedBuffer(size_t size_bytes)
    : fd_(::memfd_create("weightd-test", MFD_CLOEXEC)), size_bytes_(size_bytes) {
  WEIGHTD_CHECK(::ftruncate(fd_.get(), static_cast<off_t>(size_bytes)) == 0);
  data_ = ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
  WEIGHTD_CHECK(data_ != MAP_FAILED);
}

SharedBuffer::~SharedBuffer() { ::munmap(data_, size_bytes_); }

ScopedFd SharedBuffer::Duplicate() const {
  return ScopedFd(::fcntl(fd_.get(), F_DUPFD_CLOEXEC, 0));
}

void Reports::Add(v1::WorkerReport report) {
  const std::lock_guard lock(mutex_);
  reports_.push_back(std::move(report));
  changed_.notify_all();
}

std::optional<v1::WorkerReport> Reports::Take(
    const std::function<bool(const v1::WorkerReport&)>& fits) {
  std::unique_lock lock(mutex_);
  const Clock::time_point deadline = Soon();
  while (true) {
    for (auto it = reports_.begin(); it != reports_.end(); ++it) {
      if (!fits(*it)) continue;
      v1::WorkerReport report = std::move(*it);
      reports_.erase(it);
      return report;
    }
    if (changed_.wait_until(lock, deadline) == std::cv_status::timeout) return std::nullopt;
  }
}

std::optional<v1::StepDone> Reports::TakeDone() {
  const auto report = Take([](const auto& r) { return r.has_done(); });
  return report ? std::optional(report->done()) : std::nullopt;
}

std::optional<v1::PlanLoaded> Reports::TakePlan() {
  const auto report = Take([](const auto& r) { return r.has_plan_loaded(); });
  return report ? std::optional(report->plan_loaded()) : std::nullopt;
}

std::optional<v1::WireId> Reports::TakeWireId() {
  const auto report = Take([](const auto& r) { return r.has_wire_id(); });
  return report ? std::optional(report->wire_id()) : std::nullopt;
}

std::optional<v1::WireReady> Reports::TakeWireReady() {
  const auto report = Take([](const auto& r) { return r.has_wire_ready(); });
  return report ? std::optional(report->wire_ready()) : std::nullopt;
}

std::optional<v1::MemberAttached> Reports::TakeAttached(uint64_t member) {
  const auto report =
      Take([member](const auto& r) { return r.has_attached() && r.attached().member() == member; });
  return report ? std::optional(report->attached()) : std::nullopt;
}

std::optional<v1::MemberLost> Reports::TakeLost(uint64_t member) {
  const auto report =
      Take([member](const auto& r) { return r.has_lost() && r.lost().member() == member; });
  return report ? std::optional(report->lost()) : std::nullopt;
}

size_t Reports::size() {
  const std::lock_guard lock(mutex_);
  return reports_.size();
}

FakeClient::FakeClient(const std::string& path, uint64_t member, const std::string& token,
                       bool wants_ring) {
  StatusOr<DataChannel> channel = DataChannel::Connect(path, Soon());
  WEIGHTD_CHECK(channel.ok());
  channel_ = *std::move(channel);
  v1::DataFrame frame;
  frame.mutable_attach()->set_member(member);
  frame.mutable_attach()->set_token(token);
  frame.mutable_attach()->set_wants_ring(wants_ring);
  WEIGHTD_CHECK(channel_.Send(frame, Soon()).ok());
}

v1::DataFrame FakeClient::Next() {
  StatusOr<ReceivedFrame> received = channel_.Receive(Soon());
  if (!received.ok()) return {};
  fds_ = std::move(received->fds);
  return received->frame;
}

bool FakeClient::WaitEnd() {
  while (true) {
    const Status status = channel_.Receive(Soon()).status();
    if (!status.ok()) return ReasonOf(status) == reason::kPeerLost;
  }
}

void FakeClient::Offer(uint32_t id, const SharedBuffer& buffer, uint64_t claimed_bytes) {
  v1::DataFrame frame;
  v1::Segment& segment = *frame.mutable_segments()->add_segments();
  segment.set_id(id);
  segment.set_size_bytes(claimed_bytes);
  WEIGHTD_CHECK(channel_.Send(frame, Soon(), {buffer.fd()}).ok());
}

void FakeClient::Bind(const std::vector<v1::MemoryBinding>& bindings, bool last) {
  v1::DataFrame frame;
  for (const v1::MemoryBinding& binding : bindings) *frame.mutable_bind()->add_bindings() = binding;
  frame.mutable_bind()->set_last(last);
  WEIGHTD_CHECK(channel_.Send(frame, Soon()).ok());
}

v1::MemoryBinding MakeBinding(uint32_t index, uint32_t segment, uint64_t offset_bytes,
                              const std::vector<int64_t>& extent, v1::DType dtype) {
  v1::MemoryBinding binding;
  binding.set_index(index);
  binding.set_segment(segment);
  binding.set_offset_bytes(offset_bytes);
  binding.mutable_extent()->Add(extent.begin(), extent.end());
  binding.set_dtype(dtype);
  return binding;
}

PlanInput SmallPlan() {
  PlanInput plan;
  plan.table = {{"w", {8, 4}, DType::kFloat32}, {"b", {4}, DType::kFloat32}};
  plan.sources = {kActor0, kActor1};
  for (int64_t rank = 0; rank < 2; ++rank) {
    RankShards shards;
    shards.boxes = {{.origin = {4 * rank, 0}, .extent = {4, 4}}, {.origin = {0}, .extent = {4}}};
    shards.first = {0, 1, 2};
    shards.box_index = {0, 1};
    plan.shards.push_back(shards);
  }
  RankLayout layout;
  layout.coordinates = {.tp_rank = 0, .tp_size = 1};
  layout.params = {
      {"w", {8, 4}, DType::kBFloat16}, {"b", {4}, DType::kFloat32}, {"pad", {3}, DType::kFloat32}};
  const Box w = WholeBox({8, 4});
  const Box b = WholeBox({4});
  layout.writes = {{.tensor = 0, .param = 0, .source_dim = {0, 1}, .source = w, .target = w},
                   {.tensor = 1, .param = 1, .source_dim = {0}, .source = b, .target = b},
                   {.param = 2, .zero_fill = true, .target = WholeBox({3})}};
  plan.layouts = {layout};
  plan.source_devices = {kHostDevice, kHostDevice};
  plan.targets = {kEngine};
  plan.target_devices = {kHostDevice};
  plan.labels = {"engine e0 tp 0"};
  const std::vector<const RankLayout*> layouts = {&plan.layouts[0]};
  const Digest128 digest = PlanDigest(plan.table, plan.shards, layouts, plan.limits);
  plan.digest.assign(digest.begin(), digest.end());
  return plan;
}

std::vector<v1::PlanPage> PagesOf(const PlanInput& plan, uint64_t handle) {
  std::vector<v1::PlanPage> pages;
  const auto add = [&pages, handle]() -> v1::PlanPage& {
    pages.emplace_back().set_plan(handle);
    return pages.back();
  };
  for (const TensorInfo& tensor : plan.table) *add().add_tensors() = ToProto(tensor);
  for (uint64_t member : plan.sources) add().add_sources(member);
  for (const std::string& device : plan.source_devices) add().add_source_devices(device);
  for (uint32_t rank = 0; rank < plan.shards.size(); ++rank) {
    const RankShards& shards = plan.shards[rank];
    for (const Box& box : shards.boxes) {
      v1::RankShardsPage& page = *add().add_shards();
      page.set_source(rank);
      *page.add_boxes() = ToProto(box);
    }
    for (size_t t = 0; t + 1 < shards.first.size(); ++t) {
      v1::RankShardsPage& page = *add().add_shards();
      page.set_source(rank);
      page.add_boxes_per_tensor(shards.first[t + 1] - shards.first[t]);
      for (uint32_t i = shards.first[t]; i < shards.first[t + 1]; ++i) {
        page.add_box_index(shards.box_index[i]);
      }
    }
  }
  for (uint32_t target = 0; target < plan.layouts.size(); ++target) {
    v1::RankWritesPage& head = *add().add_writes();
    head.set_target(target);
    head.set_member(plan.targets[target]);
    head.set_label(plan.labels[target]);
    head.set_device(plan.target_devices[target]);
    *head.mutable_coordinates() = ToProto(plan.layouts[target].coordinates);
    for (const ParamInfo& param : plan.layouts[target].params) {
      v1::RankWritesPage& page = *add().add_writes();
      page.set_target(target);
      *page.add_params() = ToProto(param);
    }
    for (const Write& write : plan.layouts[target].writes) {
      v1::RankWritesPage& page = *add().add_writes();
      page.set_target(target);
      *page.add_writes() = ToProto(write);
    }
  }
  v1::PlanPage& last = add();
  last.set_last(true);
  last.set_digest(plan.digest);
  last.set_window_bytes(plan.limits.bytes);
  last.set_window_operations(plan.limits.operations);
  for (const auto& [source, target] : plan.wire_pairs) {
    v1::DevicePair& pair = *last.add_wire_pairs();
    pair.set_source(source);
    pair.set_target(target);
  }
  last.set_wire_bytes(plan.wire_bytes);
  return pages;
}

}  // namespace weightd::testing
