#include "daemon/wire/data_channel.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstring>
#include <filesystem>
#include <random>
#include <thread>

namespace weightd {
namespace {

constexpr milliseconds kPatience{5000};
Clock::time_point Soon() { return Clock::now() + kPatience; }

struct Pair {
  DataChannel a;
  DataChannel b;
};

Pair MakePair() {
  int fds[2];
  REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
  return {DataChannel(ScopedFd(fds[0])), DataChannel(ScopedFd(fds[1]))};
}

std::string ReasonOf(const Status& status) { return FieldsOf(status).reason; }

v1::DataFrame Attach(uint64_t member, const std::string& token) {
  v1::DataFrame frame;
  frame.mutable_attach()->set_member(member);
  frame.mutable_attach()->set_token(token);
  return frame;
}

void WriteRaw(const DataChannel& channel, const std::string& bytes) {
  REQUIRE(::send(channel.fd(), bytes.data(), bytes.size(), 0) ==
          static_cast<ssize_t>(bytes.size()));
}

int OpenFds() {
  int count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    ++count;
  }
  return count;
}

TEST_CASE("a frame arrives with its descriptors in order") {
  Pair pair = MakePair();
  std::vector<ScopedFd> owned;
  std::vector<int> fds;
  for (int i = 0; i < 3; ++i) {
    owned.emplace_back(::memfd_create("test", MFD_CLOEXEC));
    REQUIRE(::ftruncate(owned.back().get(), 100 + i) == 0);
    fds.push_back(owned.back().get());
  }
  REQUIRE(pair.a.Send(Attach(7, "secret"), Soon(), fds).ok());
  REQUIRE(pair.a.Send(Attach(8, ""), Soon()).ok());

  StatusOr<ReceivedFrame> first = pair.b.Receive(Soon());
  REQUIRE(first.ok());
  CHECK(first->frame.attach().member() == 7);
  CHECK(first->frame.attach().token() == "secret");
  REQUIRE(first->fds.size() == 3);
  for (int i = 0; i < 3; ++i) {
    struct stat info {};
    REQUIRE(::fstat(first->fds[static_cast<size_t>(i)].get(), &info) == 0);
    CHECK(info.st_size == 100 + i);
    CHECK((::fcntl(first->fds[static_cast<size_t>(i)].get(), F_GETFD) & FD_CLOEXEC) != 0);
  }
  StatusOr<ReceivedFrame> second = pair.b.Receive(Soon());
  REQUIRE(second.ok());
  CHECK(second->frame.attach().member() == 8);
  CHECK(second->fds.empty());
}

TEST_CASE("250 descriptors fit a frame and 251 are refused before anything is sent") {
  Pair pair = MakePair();
  const std::vector<int> most(kMaxFrameFds, STDIN_FILENO);
  REQUIRE(pair.a.Send(Attach(1, ""), Soon(), most).ok());
  StatusOr<ReceivedFrame> received = pair.b.Receive(Soon());
  REQUIRE(received.ok());
  CHECK(received->fds.size() == kMaxFrameFds);

  const std::vector<int> too_many(kMaxFrameFds + 1, STDIN_FILENO);
  CHECK(ReasonOf(pair.a.Send(Attach(1, ""), Soon(), too_many)) == reason::kMessageTooLarge);
  CHECK(ReasonOf(pair.b.Receive(Clock::now()).status()) == reason::kDeadline);
}

TEST_CASE("a receiver refuses more descriptors than a frame may have and keeps none") {
  Pair pair = MakePair();
  const int before = OpenFds();
  for (int i = 0; i < 2; ++i) {  // two messages of one frame: 400 descriptors, then its last byte
    const std::string bytes = i == 0 ? std::string("\x02\0\0\0\x0a", 5) : std::string(1, '\0');
    const std::vector<int> fds(200, STDIN_FILENO);
    alignas(cmsghdr) char control[CMSG_SPACE(200 * sizeof(int))] = {};
    iovec part{const_cast<char*>(bytes.data()), bytes.size()};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(200 * sizeof(int));
    std::memcpy(CMSG_DATA(header), fds.data(), 200 * sizeof(int));
    REQUIRE(::sendmsg(pair.a.fd(), &message, 0) > 0);
  }
  CHECK(ReasonOf(pair.b.Receive(Soon()).status()) == reason::kProtocol);
  pair.b.Close();
  CHECK(OpenFds() == before - 1);
}

TEST_CASE("a frame that comes byte by byte is received whole, across deadlines") {
  Pair pair = MakePair();
  std::string bytes;
  const v1::DataFrame frame = Attach(42, "token");
  const auto size = static_cast<uint32_t>(frame.ByteSizeLong());
  for (int i = 0; i < 4; ++i) bytes.push_back(static_cast<char>(size >> (8 * i)));
  frame.AppendToString(&bytes);
  for (size_t i = 0; i + 1 < bytes.size(); ++i) {
    WriteRaw(pair.a, bytes.substr(i, 1));
    REQUIRE(ReasonOf(pair.b.Receive(Clock::now()).status()) == reason::kDeadline);
  }
  WriteRaw(pair.a, bytes.substr(bytes.size() - 1));
  StatusOr<ReceivedFrame> received = pair.b.Receive(Soon());
  REQUIRE(received.ok());
  CHECK(received->frame.attach().member() == 42);
}

TEST_CASE("a length above the limit is refused without reading on") {
  Pair pair = MakePair();
  WriteRaw(pair.a, std::string("\x01\x00\x40\x00", 4));  // 4 MiB and one byte
  CHECK(ReasonOf(pair.b.Receive(Soon()).status()) == reason::kMessageTooLarge);
  Pair other = MakePair();
  WriteRaw(other.a, std::string(4, '\xff'));
  CHECK(ReasonOf(other.b.Receive(Soon()).status()) == reason::kMessageTooLarge);
}

TEST_CASE("a frame above the limit is refused by the sender") {
  Pair pair = MakePair();
  const Status sent = pair.a.Send(Attach(1, std::string(kMaxFrameBytes, 'x')), Soon());
  CHECK(ReasonOf(sent) == reason::kMessageTooLarge);
}

TEST_CASE("a large frame passes while both ends work") {
  Pair pair = MakePair();
  const std::string token(kMaxFrameBytes - 100, 'x');
  Status sent;
  std::jthread sender([&] { sent = pair.a.Send(Attach(1, token), Soon()); });
  StatusOr<ReceivedFrame> received = pair.b.Receive(Soon());
  sender.join();
  REQUIRE(sent.ok());
  REQUIRE(received.ok());
  CHECK(received->frame.attach().token() == token);
}

TEST_CASE("random bytes are refused or are a frame, and never end the process") {
  std::mt19937 random(20240607);
  int refused = 0;
  for (int round = 0; round < 300; ++round) {
    Pair pair = MakePair();
    std::string bytes(4 + random() % 200, '\0');
    for (char& byte : bytes) byte = static_cast<char>(random());
    if (round % 2 == 0) {  // a plausible length, so that the parser sees the rest
      const auto size = static_cast<uint32_t>(bytes.size() - 4);
      std::memcpy(bytes.data(), &size, sizeof(size));
    }
    WriteRaw(pair.a, bytes);
    pair.a.Shutdown();
    StatusOr<ReceivedFrame> received = pair.b.Receive(Soon());
    refused += received.ok() ? 0 : 1;
  }
  CHECK(refused > 200);
}

TEST_CASE("the end of the peer is an error on both sides, at once") {
  Pair pair = MakePair();
  pair.a.Close();
  CHECK(ReasonOf(pair.b.Receive(Soon()).status()) == reason::kPeerLost);
  CHECK(ReasonOf(pair.b.Send(Attach(1, ""), Soon())) == reason::kPeerLost);
}

TEST_CASE("a peer that does not read is a deadline, not a hang") {
  Pair pair = MakePair();
  const Status sent = pair.a.Send(Attach(1, std::string(kMaxFrameBytes - 100, 'x')),
                                  Clock::now() + milliseconds(20));
  CHECK(ReasonOf(sent) == reason::kDeadline);
}

TEST_CASE("shutdown wakes a blocked receiver") {
  Pair pair = MakePair();
  Status status;
  std::jthread receiver([&] { status = pair.b.Receive(Clock::time_point::max()).status(); });
  pair.b.Shutdown();
  receiver.join();
  CHECK(ReasonOf(status) == reason::kPeerLost);
}

TEST_CASE("connecting names the path that nobody listens on") {
  const Status status = DataChannel::Connect("/nonexistent/worker.sock", Soon()).status();
  CHECK(ReasonOf(status) == reason::kSocket);
  CHECK(Message(status).find("/nonexistent/worker.sock") != std::string::npos);
  CHECK(ReasonOf(DataChannel::Connect(std::string(200, 'a'), Soon()).status()) == reason::kSocket);
}

}  // namespace
}  // namespace weightd
