// The real server on its sockets gets messages with awkward fields, mutated messages and noise from
// many clients: it answers or hangs up, and serves the next client.
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <filesystem>

#include "daemon/base/version.h"
#include "daemon/server/server.h"
#include "tests/fuzz/mutator.h"
#include "weightd/v1/actor.grpc.pb.h"
#include "weightd/v1/admin.grpc.pb.h"
#include "weightd/v1/engine.grpc.pb.h"
#include "weightd/v1/worker.grpc.pb.h"

namespace weightd {
namespace {

using fuzz::Mutator;

constexpr int kSessions = 150;
const std::vector<std::string> kWords = {"",
                                         "m",
                                         "g",
                                         "e0",
                                         "lm_head.weight",
                                         "model.norm.weight",
                                         "LlamaForCausalLM",
                                         "{}",
                                         "in_place",
                                         "vllm-0.32",
                                         R"({"hidden_size": 8, "num_attention_heads": 2})"};

struct Rig {
  std::filesystem::path folder =
      std::filesystem::temp_directory_path() / ("weightd-fuzz-" + std::to_string(::getpid()));
  Config config;
  std::unique_ptr<Server> server;
  std::shared_ptr<grpc::Channel> channel;

  Rig() {
    std::filesystem::remove_all(folder);
    std::filesystem::create_directory(folder);
    config.listen.socket = folder / "weightd.sock";
    config.listen.tcp = "";
    config.listen.http = "";
    config.limits.max_sessions = 64;
    config.limits.max_tensors = 1000;
    for (milliseconds* limit :
         {&config.deadlines.admit, &config.deadlines.prepare, &config.deadlines.transfer,
          &config.deadlines.verify, &config.deadlines.commit, &config.deadlines.drain}) {
      *limit = milliseconds(20);
    }
    auto created = Server::Create(config);
    REQUIRE(created.ok());
    server = *std::move(created);
    channel =
        grpc::CreateChannel("unix:" + config.listen.socket, grpc::InsecureChannelCredentials());
  }
  ~Rig() {
    server.reset();
    std::filesystem::remove_all(folder);
  }
  void CheckHealthy() const {
    auto stub = v1::AdminService::NewStub(channel);
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    v1::GetStatusResponse response;
    REQUIRE(stub->GetStatus(&context, {}, &response).ok());
  }
};

/// Sends the requests on one stream, reads what comes until the server has nothing more to say.
template <typename Stub, typename Request, typename Event>
void Talk(const Rig& rig, const std::vector<Request>& requests, Event event) {
  auto stub = Stub::NewStub(rig.channel);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(60));
  auto stream = stub->Session(&context);
  for (const Request& request : requests) {
    if (!stream->Write(request)) break;
  }
  stream->WritesDone();
  while (stream->Read(&event)) {
  }
  (void)stream->Finish();
}

void MakePlausible(Mutator& draw, v1::ProtocolVersion* protocol) {
  if (!draw.Chance(90)) return;
  protocol->set_major(kProtocolMajor);
  protocol->set_minor(kProtocolMinor);
}

TEST_CASE("trainers with awkward fields disturb nobody") {
  const Rig rig;
  Mutator draw(1);
  for (int session = 0; session < kSessions; ++session) {
    std::vector<v1::ActorRequest> requests(static_cast<size_t>(draw.Number(1, 8)));
    for (v1::ActorRequest& request : requests) draw.Fill(&request, kWords);
    v1::ActorHello* hello = requests[0].mutable_hello();
    draw.Fill(hello, kWords);
    MakePlausible(draw, hello->mutable_protocol());
    hello->mutable_process()->clear_pid();  // else the server watches a process of ours
    if (draw.Chance(70)) hello->set_world_size(1), hello->set_rank(0);
    Talk<v1::ActorService>(rig, requests, v1::ActorEvent());
  }
  rig.CheckHealthy();
}

TEST_CASE("engines with awkward fields disturb nobody") {
  const Rig rig;
  Mutator draw(2);
  for (int session = 0; session < kSessions; ++session) {
    std::vector<v1::EngineRequest> requests(static_cast<size_t>(draw.Number(1, 8)));
    for (v1::EngineRequest& request : requests) draw.Fill(&request, kWords);
    v1::EngineHello* hello = requests[0].mutable_hello();
    draw.Fill(hello, kWords);
    MakePlausible(draw, hello->mutable_protocol());
    hello->mutable_process()->clear_pid();
    if (draw.Chance(70)) hello->clear_coordinates();
    Talk<v1::EngineService>(rig, requests, v1::EngineEvent());
  }
  rig.CheckHealthy();
}

/// One trainer of one tensor, as the client library would register and sync it.
std::vector<v1::ActorRequest> Trainer() {
  std::vector<v1::ActorRequest> requests(5);
  v1::ActorHello* hello = requests[0].mutable_hello();
  hello->mutable_protocol()->set_major(kProtocolMajor);
  hello->set_model("m");
  hello->set_group("g");
  hello->set_world_size(1);
  v1::ShardsPage* shards = requests[1].mutable_shards();
  v1::Box* box = shards->add_boxes();
  box->add_origin(0);
  box->add_extent(8);
  shards->add_boxes_per_tensor(1);
  shards->add_box_index(0);
  shards->set_last(true);
  requests[2].mutable_register_()->set_table_digest(std::string(16, 'd'));
  requests[2].mutable_register_()->set_num_tensors(1);
  v1::TensorSpec* tensor = requests[3].mutable_table()->add_tensors();
  tensor->set_name("model.norm.weight");
  tensor->add_shape(8);
  tensor->set_dtype(v1::DTYPE_FLOAT32);
  requests[3].mutable_table()->set_last(true);
  requests[4].mutable_sync()->set_version(1);
  return requests;
}

TEST_CASE("a trainer that is right but for one field disturbs nobody") {
  const Rig rig;
  Mutator draw(3);
  for (int session = 0; session < kSessions; ++session) {
    std::vector<v1::ActorRequest> requests = Trainer();
    const auto last = static_cast<int64_t>(requests.size()) - 1;
    draw.Disturb(&requests[static_cast<size_t>(draw.Number(0, last))], kWords);
    if (draw.Chance(30))
      std::swap(requests[1], requests[static_cast<size_t>(draw.Number(1, last))]);
    Talk<v1::ActorService>(rig, requests, v1::ActorEvent());
  }
  rig.CheckHealthy();
}

/// Sends bytes as the request of a call; returns whether the server answered at all.
bool Call(const Rig& rig, const std::string& method, const std::string& bytes) {
  grpc::GenericStub stub(rig.channel);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  grpc::CompletionQueue queue;
  const grpc::Slice slice(bytes);
  auto call = stub.PrepareUnaryCall(&context, method, grpc::ByteBuffer(&slice, 1), &queue);
  call->StartCall();
  grpc::ByteBuffer answer;
  grpc::Status status;
  call->Finish(&answer, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  return queue.Next(&tag, &ok) && status.error_code() != grpc::StatusCode::DEADLINE_EXCEEDED;
}

TEST_CASE("mutated bytes in every call are answered") {
  const Rig rig;
  Mutator draw(4);
  v1::GetPlanRequest plan;
  plan.set_model("m");
  plan.set_tensor("lm_head.weight");
  const std::string good = plan.SerializeAsString();
  for (int round = 0; round < kSessions; ++round) {
    const std::string bytes =
        draw.Chance(50) ? draw.Mutate(good) : draw.Noise(static_cast<size_t>(draw.Number(0, 200)));
    for (const char* method : {"/weightd.v1.AdminService/GetPlan",
                               "/weightd.v1.AdminService/GetStatus", "/weightd.v1.None/None"}) {
      REQUIRE(Call(rig, method, bytes));
    }
  }
  rig.CheckHealthy();
}

TEST_CASE("mutated bytes on the streams disturb nobody") {
  const Rig rig;
  Mutator draw(5);
  for (int round = 0; round < kSessions; ++round) {
    const std::vector<v1::ActorRequest> good = Trainer();
    const std::string bytes =
        draw.Mutate(good[static_cast<size_t>(draw.Number(0, 4))].SerializeAsString());
    for (const char* method :
         {"/weightd.v1.ActorService/Session", "/weightd.v1.EngineService/Session",
          "/weightd.v1.WorkerService/Attach"}) {
      grpc::GenericStub stub(rig.channel);
      grpc::ClientContext context;
      grpc::CompletionQueue queue;
      auto stream = stub.PrepareCall(&context, method, &queue);
      void* tag = nullptr;
      bool ok = false;
      stream->StartCall(nullptr);
      REQUIRE(queue.Next(&tag, &ok));
      const grpc::Slice slice(bytes);
      stream->Write(grpc::ByteBuffer(&slice, 1), nullptr);
      REQUIRE(queue.Next(&tag, &ok));
      grpc::Status status;
      context.TryCancel();
      stream->Finish(&status, nullptr);
      REQUIRE(queue.Next(&tag, &ok));
    }
  }
  rig.CheckHealthy();
}

}  // namespace
}  // namespace weightd
