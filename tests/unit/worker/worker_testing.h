// What the worker's tests share: lent memory, clients that speak the data socket, collected
// reports, and one small plan.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/base/scoped_fd.h"
#include "daemon/base/status.h"
#include "daemon/wire/data_channel.h"
#include "daemon/worker/plan_store.h"
#include "weightd/v1/worker.pb.h"

namespace weightd::testing {

/// How long a test waits for what must come; reached only when it fails.
inline constexpr milliseconds kPatience{10'000};
inline Clock::time_point Soon() { return Clock::now() + kPatience; }

std::string ReasonOf(const Status& status);
std::string ReasonOf(const v1::ErrorDetail& detail);

/// A path for a socket that no other test uses; removed with the object.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  std::string path(const std::string& name) const { return dir_ + "/" + name; }

 private:
  std::string dir_;
};

/// A memfd, mapped here as its owner has it.
class SharedBuffer {
 public:
  explicit SharedBuffer(size_t size_bytes);
  SharedBuffer(const SharedBuffer&) = delete;
  SharedBuffer& operator=(const SharedBuffer&) = delete;
  ~SharedBuffer();

  int fd() const { return fd_.get(); }
  size_t size_bytes() const { return size_bytes_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  ScopedFd Duplicate() const;

 private:
  ScopedFd fd_;
  size_t size_bytes_ = 0;
  void* data_ = nullptr;
};

/// Collects what a worker reports. Thread safety: any thread.
class Reports {
 public:
  void Add(v1::WorkerReport report);
  /// The first report that fits and was not taken before, or nullopt after kPatience.
  std::optional<v1::WorkerReport> Take(const std::function<bool(const v1::WorkerReport&)>& fits);
  std::optional<v1::StepDone> TakeDone();
  std::optional<v1::PlanLoaded> TakePlan();
  std::optional<v1::WireId> TakeWireId();
  std::optional<v1::WireReady> TakeWireReady();
  std::optional<v1::MemberAttached> TakeAttached(uint64_t member);
  std::optional<v1::MemberLost> TakeLost(uint64_t member);
  /// Reports that were not taken.
  size_t size();

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<v1::WorkerReport> reports_;
};

/// A client's end of the data socket.
class FakeClient {
 public:
  /// Connects and sends DataAttach.
  FakeClient(const std::string& path, uint64_t member, const std::string& token,
             bool wants_ring = false);

  DataChannel& channel() { return channel_; }
  /// The next frame, or an empty one after kPatience or at the end of the connection.
  v1::DataFrame Next();
  /// The descriptors of the last frame.
  std::vector<ScopedFd>& fds() { return fds_; }
  /// True once the worker has closed the connection.
  bool WaitEnd();

  void Offer(uint32_t id, const SharedBuffer& buffer, uint64_t claimed_bytes);
  void Offer(uint32_t id, const SharedBuffer& buffer) { Offer(id, buffer, buffer.size_bytes()); }
  void Bind(const std::vector<v1::MemoryBinding>& bindings, bool last = true);

 private:
  DataChannel channel_;
  std::vector<ScopedFd> fds_;
};

v1::MemoryBinding MakeBinding(uint32_t index, uint32_t segment, uint64_t offset_bytes,
                              const std::vector<int64_t>& extent, v1::DType dtype);

/// Two actors hold `w` [8, 4] float32 by halves of its rows and `b` [4] float32 both; one engine
/// rank has `w` as bfloat16, `b` and `pad` [3] float32, the latter filled with zeros. Its digest is
/// set.
PlanInput SmallPlan();
inline constexpr uint64_t kActor0 = 10;
inline constexpr uint64_t kActor1 = 11;
inline constexpr uint64_t kEngine = 20;
inline constexpr uint64_t kPeer = 21;

/// The plan as the daemon would send it, in many small pages.
std::vector<v1::PlanPage> PagesOf(const PlanInput& plan, uint64_t handle);

}  // namespace weightd::testing
