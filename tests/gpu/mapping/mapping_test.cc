// GPU memory of another process: lent by the client's code, mapped by the worker's.
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include "daemon/device/cuda/segment_mapping.h"
#include "daemon/wire/convert.h"
#include "daemon/wire/data_channel.h"
#include "daemon/worker/member_memory.h"
#include "tests/gpu/mapping/driver_more.h"
#include "tests/gpu/mapping/mapping_pattern.h"

extern char** environ;

namespace weightd {
namespace {

using testing::kElements;
using testing::Pattern;

/// A running mapping_owner.
class Owner {
 public:
  explicit Owner(const std::string& kind) {
    int pair[2], to[2], from[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    REQUIRE((::pipe2(to, O_CLOEXEC) == 0 && ::pipe2(from, O_CLOEXEC) == 0));
    posix_spawn_file_actions_t actions;
    ::posix_spawn_file_actions_init(&actions);
    ::posix_spawn_file_actions_adddup2(&actions, to[0], STDIN_FILENO);
    ::posix_spawn_file_actions_adddup2(&actions, from[1], STDOUT_FILENO);
    ::posix_spawn_file_actions_adddup2(&actions, pair[1], 3);
    std::string program =
        std::filesystem::read_symlink("/proc/self/exe").parent_path() / "mapping_owner";
    std::string argument = kind;
    char* argv[] = {program.data(), argument.data(), nullptr};
    REQUIRE(::posix_spawn(&pid_, program.c_str(), &actions, nullptr, argv, environ) == 0);
    ::posix_spawn_file_actions_destroy(&actions);
    ::close(pair[1]);
    ::close(to[0]);
    ::close(from[1]);
    channel_ = DataChannel(ScopedFd(pair[0]));
    to_ = ScopedFd(to[1]);
    from_ = ScopedFd(from[0]);
  }
  ~Owner() {
    to_.Reset();
    if (pid_ > 0) ::waitpid(pid_, nullptr, 0);
  }

  ReceivedFrame Receive() {
    StatusOr<ReceivedFrame> frame = channel_.Receive(Clock::now() + milliseconds(30'000));
    INFO(Message(frame.status()));
    REQUIRE(frame.ok());
    return *std::move(frame);
  }
  bool SeesWhatWasWritten() {
    char answer = 0;
    return ::write(to_.get(), "r", 1) == 1 && ::read(from_.get(), &answer, 1) == 1 && answer == 'y';
  }
  void Kill() {
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
    pid_ = 0;
  }

 private:
  pid_t pid_ = 0;
  DataChannel channel_;
  ScopedFd to_;
  ScopedFd from_;
};

/// The worker's side: a context on the first GPU.
struct WorkerSide {
  WorkerSide() {
    const StatusOr<const cuda::Driver*> loaded = cuda::LoadDriver();
    REQUIRE(loaded.ok());
    driver = *loaded;
    const auto devices = cuda::ListDevices(*driver);
    REQUIRE(devices.ok());
    const auto created = cuda::WorkerContext::Create(devices->front());
    INFO(Message(created.status()));
    REQUIRE(created.ok());
    context = *created;
    mapper = std::make_unique<cuda::CudaSegmentMapper>(context);
    more = testing::LoadMoreDriver();
  }
  size_t free_bytes() const {
    const auto current = cuda::ScopedPrimaryContext::Enter(*driver, context->ordinal());
    size_t free = 0, total = 0;
    REQUIRE(more.MemGetInfo(&free, &total) == cuda::kSuccess);
    return free;
  }

  const cuda::Driver* driver = nullptr;
  testing::MoreDriver more;
  std::shared_ptr<const cuda::WorkerContext> context;
  std::unique_ptr<cuda::CudaSegmentMapper> mapper;
};

/// Takes one whole registration.
StatusOr<std::shared_ptr<const MemberMemory>> Take(Owner* owner, MemoryRegistration* registration) {
  while (true) {
    ReceivedFrame received = owner->Receive();
    if (received.frame.has_refused()) return FromProto(received.frame.refused().error());
    if (received.frame.has_segments()) {
      WEIGHTD_RETURN_IF_ERROR(
          registration->Offer(received.frame.segments(), std::move(received.fds)));
      continue;
    }
    return registration->Bind(received.frame.bind());
  }
}

/// Compares the mapped memory with what the owner wrote, and adds one to every element.
void CheckAndAdd(const WorkerSide& worker, const MemberMemory& memory) {
  const auto current = cuda::ScopedPrimaryContext::Enter(*worker.driver, worker.context->ordinal());
  REQUIRE(memory.blocks.size() == 1);
  const auto address = reinterpret_cast<cuda::DevicePtr>(memory.blocks[0].binding.base);
  std::vector<uint32_t> content(kElements);
  REQUIRE(worker.driver->MemcpyDtoH(content.data(), address, kElements * 4) == cuda::kSuccess);
  size_t wrong = 0;
  for (size_t i = 0; i < kElements; ++i) {
    wrong += content[i] != Pattern(i);
    ++content[i];
  }
  CHECK(wrong == 0);
  REQUIRE(worker.more.MemcpyHtoD(address, content.data(), kElements * 4) == cuda::kSuccess);
  REQUIRE(worker.more.CtxSynchronize() == cuda::kSuccess);
}

bool Await(const LenderFence& fence) {
  for (int i = 0; i < 1000; ++i) {
    const StatusOr<bool> passed = fence.Passed();
    INFO(Message(passed.status()));
    REQUIRE(passed.ok());
    if (*passed) return true;
    ::usleep(1000);
  }
  return false;
}

TEST_CASE("lent GPU memory is the same memory here", "[gpu]") {
  const std::string kind = GENERATE("whole", "pieces");
  CAPTURE(kind);
  WorkerSide worker;
  Owner owner(kind);
  MemoryRegistration registration(true, "engine e0 tp 0", worker.mapper.get());
  const auto memory = Take(&owner, &registration);
  INFO(Message(memory.status()));
  REQUIRE(memory.ok());
  REQUIRE((*memory)->fence != nullptr);
  CHECK(Await(*(*memory)->fence));
  CHECK((*memory)->segments.size() == 1);
  CheckAndAdd(worker, **memory);
  CHECK(owner.SeesWhatWasWritten());
}

TEST_CASE("a killed owner leaves its memory only until the mapping is closed", "[gpu]") {
  const std::string kind = GENERATE("whole", "pieces");
  CAPTURE(kind);
  WorkerSide worker;
  const size_t before = worker.free_bytes();
  {
    Owner owner(kind);
    MemoryRegistration registration(false, "actor 0", worker.mapper.get());
    const auto memory = Take(&owner, &registration);
    INFO(Message(memory.status()));
    REQUIRE(memory.ok());
    owner.Kill();
    CheckAndAdd(worker, **memory);  // still ours to read and write
    CHECK(worker.free_bytes() + kElements * 4 <= before);
  }
  size_t after = 0;
  for (int i = 0; i < 100 && after + (8u << 20) < before; ++i) {
    ::usleep(20'000);
    after = worker.free_bytes();
  }
  CHECK(after + (8u << 20) >= before);
}

TEST_CASE("memory that cannot be mapped is refused with a remedy", "[gpu]") {
  const std::string kind = GENERATE("hidden", "pool");
  CAPTURE(kind);
  WorkerSide worker;
  Owner owner(kind);
  MemoryRegistration registration(false, "actor 0", worker.mapper.get());
  const Status refused = Take(&owner, &registration).status();
  INFO(Message(refused));
  CHECK(refused.code() == StatusCode::kUnimplemented);
  CHECK(FieldsOf(refused).reason == reason::kMemory);
  CHECK(FieldsOf(refused).tensor == "w");
  CHECK(FieldsOf(refused).remedy.find("expandable_segments") != std::string::npos);
}

TEST_CASE("one allocation is mapped once, whoever offers it", "[gpu]") {
  WorkerSide worker;
  Owner owner("whole");
  ReceivedFrame offer = owner.Receive();
  MemoryRegistration first(false, "actor 0", worker.mapper.get());
  MemoryRegistration second(true, "engine e0 tp 0", worker.mapper.get());
  REQUIRE(first.Offer(offer.frame.segments(), {}).ok());
  REQUIRE(second.Offer(offer.frame.segments(), {}).ok());
  const v1::BindMemory bind = owner.Receive().frame.bind();
  const auto one = first.Bind(bind);
  const auto two = second.Bind(bind);
  REQUIRE((one.ok() && two.ok()));
  CHECK((*one)->blocks[0].binding.base == (*two)->blocks[0].binding.base);
}

TEST_CASE("offers that lie are refused before anything is touched", "[gpu]") {
  WorkerSide worker;
  Owner owner("whole");
  const v1::OfferSegments good = owner.Receive().frame.segments();
  MemoryRegistration registration(false, "actor 0", worker.mapper.get());
  v1::OfferSegments offer = good;
  SECTION("a larger allocation than there is") {
    offer.mutable_segments(0)->set_size_bytes(good.segments(0).size_bytes() + (64u << 20));
    CHECK(FieldsOf(registration.Offer(offer, {})).reason == reason::kMemory);
  }
  SECTION("a GPU that does not exist") {
    offer.mutable_segments(0)->set_device("GPU-00000000-0000-0000-0000-000000000000");
    CHECK(FieldsOf(registration.Offer(offer, {})).reason == reason::kDevice);
  }
  SECTION("a handle of nothing") {
    offer.mutable_segments(0)->set_ipc_handle(std::string(64, 'x'));
    CHECK(FieldsOf(registration.Offer(offer, {})).reason == reason::kMemory);
  }
  SECTION("half a handle") {
    offer.mutable_segments(0)->set_ipc_handle(std::string(32, 'x'));
    CHECK(FieldsOf(registration.Offer(offer, {})).reason == reason::kProtocol);
  }
  SECTION("host memory") {
    offer.mutable_segments(0)->set_kind(v1::SEGMENT_KIND_SHARED_MEMORY);
    std::vector<ScopedFd> fds;
    fds.emplace_back(::memfd_create("host", 0));
    CHECK(FieldsOf(registration.Offer(offer, std::move(fds))).reason == reason::kDevice);
  }
  SECTION("an event of nothing") {
    offer.set_event(std::string(64, 'x'));
    CHECK_FALSE(registration.Offer(offer, {}).ok());
  }
}

TEST_CASE("an unknown GPU is named with those that exist", "[gpu]") {
  WorkerSide worker;
  const auto wrong = cuda::WorkerContext::Create("GPU-00000000-0000-0000-0000-000000000000");
  CHECK(wrong.status().code() == StatusCode::kNotFound);
  CHECK(Message(wrong.status()).find(worker.context->uuid()) != std::string::npos);
}

}  // namespace
}  // namespace weightd

int main(int argc, char** argv) {
  const auto driver = weightd::cuda::LoadDriver();
  if (!driver.ok()) {
    std::printf("skipped: %s\n", weightd::Message(driver.status()).c_str());
    return 77;
  }
  return Catch::Session().run(argc, argv);
}
