// The real server on its socket, spoken to by raw stubs: what a wrong or hostile client gets.
#include "daemon/server/server.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "daemon/base/version.h"

namespace weightd {
namespace {

struct Rig {
  std::filesystem::path folder =
      std::filesystem::temp_directory_path() / ("weightd-server-" + std::to_string(::getpid()));
  Config config;
  std::unique_ptr<Server> server;

  explicit Rig(bool own_worker = true) {
    if (!own_worker) config.worker.devices.clear();
    std::filesystem::remove_all(folder);
    std::filesystem::create_directory(folder);
    config.listen.socket = folder / "weightd.sock";
    config.listen.tcp = "127.0.0.1:0";
    config.listen.http = "";
    auto created = Server::Create(config);
    REQUIRE(created.ok());
    server = *std::move(created);
  }
  ~Rig() {
    server.reset();
    std::filesystem::remove_all(folder);
  }
  std::shared_ptr<grpc::Channel> Channel() const {
    return grpc::CreateChannel("unix:" + config.listen.socket, grpc::InsecureChannelCredentials());
  }
  bool Healthy() const {
    auto stub = v1::AdminService::NewStub(Channel());
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
    v1::GetStatusResponse response;
    return stub->GetStatus(&context, {}, &response).ok();
  }
};

v1::ActorRequest Hello(uint32_t major, uint32_t minor) {
  v1::ActorRequest request;
  v1::ActorHello* hello = request.mutable_hello();
  hello->mutable_protocol()->set_major(major);
  hello->mutable_protocol()->set_minor(minor);
  hello->set_model("m");
  hello->set_group("g");
  hello->set_world_size(1);
  return request;
}

v1::ActorEvent Answer(const Rig& rig, const v1::ActorRequest& request) {
  auto stub = v1::ActorService::NewStub(rig.Channel());
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
  auto stream = stub->Session(&context);
  stream->Write(request);
  v1::ActorEvent event;
  stream->Read(&event);
  context.TryCancel();
  (void)stream->Finish();
  return event;
}

TEST_CASE("clients of another protocol are told which side to upgrade") {
  const Rig rig;
  CHECK(Answer(rig, Hello(kProtocolMajor, kProtocolMinor)).has_welcome());
  for (auto [major, minor] :
       {std::pair(kProtocolMajor + 1, 0u), {kProtocolMajor, kProtocolMinor + 1}}) {
    const v1::ActorEvent newer = Answer(rig, Hello(major, minor));
    CHECK(newer.error().detail().reason() == reason::kProtocolVersion);
    CHECK(newer.error().detail().remedy().find("upgrade the daemon") != std::string::npos);
    CHECK(newer.error().fatal());
  }
  const v1::ActorEvent older = Answer(rig, Hello(0, 9));
  CHECK(older.error().detail().remedy() == "upgrade the client library");
}

TEST_CASE("a client that does not say hello first is refused") {
  const Rig rig;
  v1::ActorRequest request;
  request.mutable_sync()->set_version(1);
  CHECK(Answer(rig, request).error().detail().reason() == reason::kProtocol);
}

TEST_CASE("a message that is too large ends its stream and nothing else") {
  const Rig rig;
  auto stub = v1::ActorService::NewStub(rig.Channel());
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
  auto stream = stub->Session(&context);
  v1::ActorRequest request = Hello(kProtocolMajor, kProtocolMinor);
  request.mutable_hello()->set_model(std::string(kMaxMessageBytes + 1, 'x'));
  stream->Write(request);
  v1::ActorEvent event;
  while (stream->Read(&event)) {
  }
  CHECK(stream->Finish().error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED);
  CHECK(rig.Healthy());
}

TEST_CASE("a process that is not the daemon's child cannot attach as its worker") {
  const Rig rig;
  auto stub = v1::WorkerService::NewStub(rig.Channel());
  grpc::ClientContext context;
  auto stream = stub->Attach(&context);
  v1::WorkerReport report;
  *report.mutable_hello()->mutable_protocol() = v1::ProtocolVersion();
  report.mutable_hello()->mutable_protocol()->set_major(kProtocolMajor);
  report.mutable_hello()->set_token("guessed");
  report.mutable_hello()->set_device(kHostDevice);
  stream->Write(report);
  v1::WorkerCommand command;
  CHECK_FALSE(stream->Read(&command));
  CHECK(stream->Finish().error_code() == grpc::StatusCode::UNAUTHENTICATED);
}

/// A trainer rank that has registered one tensor on a device that the daemon does not serve.
struct Registering {
  explicit Registering(const Rig& rig, bool spawns)
      : stub(v1::ActorService::NewStub(rig.Channel())) {
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
    stream = stub->Session(&context);
    v1::ActorRequest request = Hello(kProtocolMajor, kProtocolMinor);
    request.mutable_hello()->set_spawns_worker(spawns);
    stream->Write(request);
    request.mutable_shards()->add_boxes_per_tensor(0);
    request.mutable_shards()->set_last(true);
    stream->Write(request);
    request.mutable_register_()->set_num_tensors(1);
    request.mutable_register_()->set_table_digest("0123456789abcdef");
    stream->Write(request);
    v1::TensorSpec* tensor = request.mutable_table()->add_tensors();
    tensor->set_name("w");
    tensor->add_shape(4);
    tensor->set_dtype(v1::DTYPE_FLOAT32);
    request.mutable_table()->set_last(true);
    stream->Write(request);
  }
  ~Registering() {
    context.TryCancel();
    (void)stream->Finish();
  }
  /// The next event of this kind.
  v1::ActorEvent Await(v1::ActorEvent::EventCase kind) {
    v1::ActorEvent event;
    while (stream->Read(&event) && event.event_case() != kind) {
    }
    return event;
  }

  std::unique_ptr<v1::ActorService::Stub> stub;
  grpc::ClientContext context;
  std::unique_ptr<grpc::ClientReaderWriter<v1::ActorRequest, v1::ActorEvent>> stream;
};

/// A worker's connection; it lasts as long as the object.
struct Attaching {
  Attaching(const Rig& rig, const std::string& device, const std::string& token)
      : stub(v1::WorkerService::NewStub(rig.Channel())) {
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
    stream = stub->Attach(&context);
    v1::WorkerReport report;
    report.mutable_hello()->mutable_protocol()->set_major(kProtocolMajor);
    report.mutable_hello()->set_token(token);
    report.mutable_hello()->set_device(device);
    report.mutable_hello()->set_socket_path("/tmp/w.sock");
    report.mutable_hello()->set_pid(71);
    stream->Write(report);
  }
  ~Attaching() {
    context.TryCancel();
    (void)stream->Finish();
  }
  bool refused() {
    v1::WorkerCommand command;
    return !stream->Read(&command);
  }

  std::unique_ptr<v1::WorkerService::Stub> stub;
  grpc::ClientContext context;
  std::unique_ptr<grpc::ClientReaderWriter<v1::WorkerReport, v1::WorkerCommand>> stream;
};

TEST_CASE("a daemon without a worker refuses a client that starts none, with the remedy") {
  const Rig rig(false);
  const v1::ErrorDetail error =
      Registering(rig, false).Await(v1::ActorEvent::kError).error().detail();
  CHECK(error.reason() == reason::kUnknownDevice);
  CHECK(error.remedy().find("worker=\"spawn\"") != std::string::npos);
}

TEST_CASE("a client is asked to start the worker, and only that worker may attach") {
  const Rig rig(false);
  Registering actor(rig, true);
  const v1::StartWorker order = actor.Await(v1::ActorEvent::kStartWorker).start_worker();
  CHECK(order.device() == kHostDevice);
  CHECK(order.attach_within_ms() == 30'000);
  CHECK(order.settings().register_within_ms() == 10'000);
  CHECK(actor.Await(v1::ActorEvent::kRegistered).registered().worker().socket_path().empty());
  CHECK(Attaching(rig, kHostDevice, "guessed").refused());
  CHECK(Attaching(rig, kHostDevice, "").refused());
  CHECK(Attaching(rig, "host.1", order.token()).refused());
  const Attaching worker(rig, kHostDevice, order.token());
  const v1::ActorEvent changed = actor.Await(v1::ActorEvent::kWorkerChanged);
  CHECK(changed.worker_changed().socket_path() == "/tmp/w.sock");
  grpc::ClientContext context;
  v1::GetStatusResponse status;
  REQUIRE(v1::AdminService::NewStub(rig.Channel())->GetStatus(&context, {}, &status).ok());
  REQUIRE(status.workers_size() == 1);
  CHECK(status.workers(0).owner().starts_with("actor 0 (pid "));
  CHECK((status.workers(0).attached() && status.workers(0).pid() == 71));
}

TEST_CASE("random bytes on the socket disturb nobody") {
  const Rig rig;
  std::mt19937_64 random(20261123);
  for (int round = 0; round < 50; ++round) {
    const ScopedFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, rig.config.listen.socket.c_str(), sizeof address.sun_path - 1);
    REQUIRE(::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
    std::string bytes(random() % 5000, '\0');
    for (char& byte : bytes) byte = static_cast<char>(random());
    [[maybe_unused]] const ssize_t sent =
        ::send(fd.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
  }
  CHECK(rig.Healthy());
}

TEST_CASE("a socket path that cannot be used is refused with the reason") {
  const Rig rig;
  Config config = rig.config;
  CHECK(Message(Server::Create(config).status()).find("another daemon is listening") !=
        std::string::npos);
  config.listen.socket = rig.folder / "file";
  std::ofstream(config.listen.socket) << "not a socket";
  CHECK(Message(Server::Create(config).status()).find("not a socket") != std::string::npos);
  config.listen.socket = rig.folder / "file" / "weightd.sock";
  CHECK(FieldsOf(Server::Create(config).status()).reason == reason::kSocket);
  config.listen.socket = rig.folder / std::string(120, 'x');
  CHECK(Message(Server::Create(config).status()).find("too long") != std::string::npos);
  config.listen.socket = rig.folder / "other.sock";
  config.listen.tcp = fmt::format("127.0.0.1:{}", rig.server->tcp_port());
  CHECK(FieldsOf(Server::Create(config).status()).reason == reason::kSocket);
}

TEST_CASE("a malformed rule file stops the start with file and line") {
  Rig rig;
  std::filesystem::create_directory(rig.folder / "rules");
  std::ofstream(rig.folder / "rules" / "broken.rules") << "architecture X\nnonsense here\n";
  Config config = rig.config;
  config.runtime.loaders_dir = rig.folder / "rules";
  const Status status = CheckEnvironment(config);
  CHECK(FieldsOf(status).reason == reason::kRuleFile);
  CHECK(Message(status).find("broken.rules:") != std::string::npos);
}

}  // namespace
}  // namespace weightd
