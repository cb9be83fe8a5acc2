#include "client/ctl/admin_client.h"

#include <grpcpp/grpcpp.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <filesystem>

#include "client/ctl/commands.h"
#include "daemon/base/scoped_fd.h"
#include "daemon/wire/convert.h"

namespace weightd::ctl {
namespace {

// Answers what a test put there.
class FakeAdmin final : public v1::AdminService::Service {
 public:
  v1::GetStatusResponse status;
  Status plan_error;

  grpc::Status GetStatus(grpc::ServerContext*, const v1::GetStatusRequest*,
                         v1::GetStatusResponse* response) override {
    *response = status;
    return grpc::Status::OK;
  }
  grpc::Status GetPlan(grpc::ServerContext*, const v1::GetPlanRequest* request,
                       v1::GetPlanResponse* response) override {
    if (plan_error.ok()) {
      response->set_model(request->model());
      return grpc::Status::OK;
    }
    return grpc::Status(static_cast<grpc::StatusCode>(plan_error.code()), Message(plan_error),
                        ToProto(plan_error).SerializeAsString());
  }
};

struct Fixture {
  std::filesystem::path dir;
  std::string path;
  FakeAdmin admin;
  std::unique_ptr<grpc::Server> server;

  Fixture() {
    char name[] = "/tmp/weightd_ctl_XXXXXX";
    REQUIRE(mkdtemp(name) != nullptr);
    dir = name;
    path = dir / "w.sock";
  }
  ~Fixture() {
    if (server) server->Shutdown();
    std::filesystem::remove_all(dir);
  }
  void Serve() {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("unix:" + path, grpc::InsecureServerCredentials());
    builder.RegisterService(&admin);
    server = builder.BuildAndStart();
    REQUIRE(server != nullptr);
  }
  GlobalOptions Global() const {
    return {
        .address = "unix:" + path, .timeout = std::chrono::seconds(20), .format = Format::kJson};
  }
};

TEST_CASE("an answer arrives by unix: address and by path alone") {
  Fixture f;
  f.admin.status.set_daemon_version("9.9");
  f.Serve();
  for (const std::string& address : {"unix:" + f.path, "unix://" + f.path, f.path}) {
    AdminClient client(address, std::chrono::seconds(20));
    const auto status = client.GetStatus({});
    REQUIRE(status.ok());
    CHECK(status->daemon_version() == "9.9");
  }
}

TEST_CASE("the daemon's typed error arrives with its fields") {
  Fixture f;
  f.admin.plan_error = WithTensor(
      Error(StatusCode::kNotFound, reason::kNoPlan, "start an engine", "no engine"), "t");
  f.Serve();
  AdminClient client(f.path, std::chrono::seconds(20));
  const auto plan = client.GetPlan({});
  REQUIRE_FALSE(plan.ok());
  CHECK(plan.status().code() == StatusCode::kNotFound);
  CHECK(Message(plan.status()) == "no engine");
  CHECK(FieldsOf(plan.status()).reason == reason::kNoPlan);
  CHECK(FieldsOf(plan.status()).tensor == "t");
  CHECK(FieldsOf(plan.status()).remedy == "start an engine");
  CHECK(ExitCodeOf(plan.status()) == ExitCode::kFailure);
}

TEST_CASE("a daemon that is not there is unreachable, with the address and a remedy") {
  Fixture f;
  AdminClient client(f.path, std::chrono::seconds(20));
  const auto status = client.GetStatus({});
  REQUIRE_FALSE(status.ok());
  CHECK(ExitCodeOf(status.status()) == ExitCode::kUnreachable);
  CHECK(Message(status.status()).find(f.path) != std::string::npos);
  CHECK(FieldsOf(status.status()).remedy.starts_with("there is no such socket: start weightd"));
}

TEST_CASE("a daemon that does not answer is a timeout") {
  Fixture f;
  // Listens and never accepts.
  ScopedFd fd(socket(AF_UNIX, SOCK_STREAM, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  f.path.copy(address.sun_path, sizeof(address.sun_path) - 1);
  REQUIRE(bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0);
  REQUIRE(listen(fd.get(), 1) == 0);
  AdminClient client(f.path, std::chrono::milliseconds(200));
  CHECK(ExitCodeOf(client.GetStatus({}).status()) == ExitCode::kTimeout);
}

TEST_CASE("health passes for a ready engine only") {
  Fixture f;
  auto* model = f.admin.status.add_models();
  model->set_model("m");
  auto* engine = model->add_engines();
  engine->set_engine("e0");
  engine->set_state(v1::ENGINE_STATE_SERVING);
  engine->set_ready(true);
  f.Serve();
  CHECK(RunHealth(f.Global(), "", "") == ExitCode::kOk);
  CHECK(RunHealth(f.Global(), "", "e0") == ExitCode::kOk);
  CHECK(RunHealth(f.Global(), "", "e1") == ExitCode::kUnhealthy);
}

TEST_CASE("plan show needs a model only when there are several") {
  Fixture f;
  f.Serve();
  CHECK(RunPlanShow(f.Global(), {}) == ExitCode::kFailure);
  f.admin.status.add_models()->set_model("a");
  CHECK(RunPlanShow(f.Global(), {}) == ExitCode::kOk);
  f.admin.status.add_models()->set_model("b");
  CHECK(RunPlanShow(f.Global(), {}) == ExitCode::kUsage);
  CHECK(RunPlanShow(f.Global(), {.model = "b"}) == ExitCode::kOk);
}

}  // namespace
}  // namespace weightd::ctl
