#include "client/ctl/render.h"

#include <google/protobuf/text_format.h>

#include <catch2/catch.hpp>

#include "client/ctl/health.h"

namespace weightd::ctl {
namespace {

template <typename Message>
Message Parse(const char* text) {
  Message message;
  REQUIRE(google::protobuf::TextFormat::ParseFromString(text, &message));
  return message;
}

v1::GetStatusResponse Busy() {
  return Parse<v1::GetStatusResponse>(R"pb(
    daemon_version: "0.1.0"
    protocol { major: 1 minor: 0 }
    epoch: 3
    uptime_us: 7500000000
    workers {
      device: "host"
      pid: 4711
      attached: true
      restarts: 1
      members: 6
      mapped_bytes: 1610612736
      last_exit: "signal 9"
    }
    models {
      model: "llama"
      highest_version: 7
      actors { group: "g1" world_size: 4 registered: 4 tensors: 1291 }
      engines {
        engine: "e0"
        dp_rank: 0
        state: ENGINE_STATE_SERVING
        ready: true
        version: 7
        architecture: "LlamaForCausalLM"
        profile: "vllm-0.32"
        ranks: 2
        registered: 2
        params: 195
        loader: "llama"
        stages: 3
        staged_bytes: 268435456
      }
      engines {
        engine: "engine-one"
        dp_rank: 1
        state: ENGINE_STATE_POISONED
        version: 6
        architecture: "LlamaForCausalLM"
        profile: "vllm-0.32"
        ranks: 2
        registered: 1
        params: 195
        loader: "llama"
        error { code: 14 reason: "PEER_LOST" message: "a peer is gone" }
      }
      sync {
        version: 8
        attempt { epoch: 3 counter: 12 }
        phase: PHASE_TRANSFER
        bytes_done: 1288490188
        bytes_total: 2147483648
        elapsed_us: 412000
        bytes_per_second: 3328599654
        phases { phase: PHASE_ADMIT duration_us: 120 }
        phases { phase: PHASE_PREPARE duration_us: 2100 }
        waiting_for: "actor 3"
      }
      history {
        version: 7
        attempt { epoch: 3 counter: 11 }
        replicas { engine: "e0" committed: true version: 7 }
        replicas { engine: "engine-one" dp_rank: 1 version: 6 }
        phases { phase: PHASE_TRANSFER duration_us: 350000 }
        phases { phase: PHASE_VERIFY duration_us: 50000 }
        bytes: 1073741824
        error {
          code: 14
          reason: "PEER_LOST"
          message: "a peer is gone"
          rank: "engine engine-one tp 1"
          phase: "transfer"
          peer: "worker host"
          remedy: "start the engine again"
        }
      }
      history {
        version: 6
        attempt { epoch: 2 counter: 1 }
        replicas { engine: "e0" committed: true version: 6 }
        replicas { engine: "engine-one" dp_rank: 1 committed: true version: 6 }
        phases { phase: PHASE_TRANSFER duration_us: 250000 }
        bytes: 2147483648
        pause_us: 1500000
      }
    }
  )pb");
}

TEST_CASE("status shows daemon, workers, the running sync, replicas and the last result") {
  CHECK(RenderStatus(Busy(), {}) ==
        R"(weightd 0.1.0 (protocol 1.0), epoch 3, up 2h 05m

WORKER  STATE      PID  MEMBERS    MAPPED  RESTARTS  LAST EXIT
host    attached  4711        6  1.50 GiB         1  signal 9

model llama: version 7, trainer g1 with 4 of 4 ranks, 1,291 tensors
  syncing version 8 (attempt 3.12): transfer, 1.20 GiB of 2.00 GiB (60 %), 3.10 GiB/s, 412.0 ms elapsed, waiting for actor 3
    admit 120 us, prepare 2.1 ms
  ENGINE      DP  STATE     READY  VERSION  RANKS  ERROR
  e0           0  SERVING   yes          7    2/2  -
  engine-one   1  POISONED  no           6    1/2  a peer is gone
  last sync: version 7 (attempt 3.11) failed in 1 of 2 replicas, 1.00 GiB in 400.0 ms
    PEER_LOST: a peer is gone (rank engine engine-one tp 1, phase transfer, peer worker host)
    remedy: start the engine again
)");
}

TEST_CASE("status of a daemon that knows nobody says so") {
  const auto status = Parse<v1::GetStatusResponse>(R"pb(daemon_version: "0.1.0"
                                                        protocol { major: 1 }
                                                        epoch: 1
                                                        uptime_us: 900
                                                        draining: true)pb");
  CHECK(RenderStatus(status, {}) ==
        "weightd 0.1.0 (protocol 1.0), epoch 1, up 900 us, draining\n\nno worker\n\n"
        "no model: no trainer and no engine has registered\n");
}

TEST_CASE("a model with nothing but a name renders without a sync or a result") {
  const auto status = Parse<v1::GetStatusResponse>(R"pb(models { model: "m" })pb");
  const std::string text = RenderStatus(status, {});
  CHECK(text.find("model m: version -, no trainer\n  no engine\n") != std::string::npos);
  CHECK(text.find("sync") == std::string::npos);
}

TEST_CASE("engines lists every replica, wide adds where its layout comes from") {
  CHECK(RenderEngines(Busy(), {}) ==
        R"(MODEL  ENGINE      DP  STATE     READY  VERSION  RANKS  ERROR
llama  e0           0  SERVING   yes          7    2/2  -
llama  engine-one   1  POISONED  no           6    1/2  a peer is gone
)");
  CHECK(
      RenderEngines(Busy(), {.wide = true}) ==
      R"(MODEL  ENGINE      DP  STATE     READY  VERSION  RANKS  PARAMS  STAGES      STAGED  ARCHITECTURE      PROFILE    LOADER  ERROR
llama  e0           0  SERVING   yes          7    2/2     195       3  256.00 MiB  LlamaForCausalLM  vllm-0.32  llama   -
llama  engine-one   1  POISONED  no           6    1/2     195       -           -  LlamaForCausalLM  vllm-0.32  llama   a peer is gone
)");
  CHECK(RenderEngines({}, {}) == "no engine has registered\n");
}

TEST_CASE("versions lists what replicas hold and past syncs, latest first") {
  CHECK(RenderVersions(Busy(), {}) ==
        R"(model llama: highest version 7
  ENGINE      DP  VERSION  STATE
  e0           0        7  SERVING
  engine-one   1        6  POISONED

  SYNC OF  ATTEMPT  RESULT     REPLICAS     BYTES      TIME   PAUSE  ERROR
        7  3.11     failed     1/2       1.00 GiB  400.0 ms       -  a peer is gone
        6  2.1      committed  2/2       2.00 GiB  250.0 ms  1.50 s  -
)");
}

TEST_CASE("states are coloured without moving the columns") {
  const std::string plain = RenderEngines(Busy(), {});
  std::string colored = RenderEngines(Busy(), {.color = true});
  CHECK(colored.find("\033[32mSERVING\033[0m   ") != std::string::npos);
  CHECK(colored.find("\033[31mPOISONED\033[0m  ") != std::string::npos);
  for (size_t at = 0; (at = colored.find('\033')) != std::string::npos;) {
    colored.erase(at, colored.find('m', at) - at + 1);
  }
  CHECK(colored == plain);
}

TEST_CASE("names from clients cannot drive the terminal") {
  const auto status = Parse<v1::GetStatusResponse>(R"pb(models {
                                                          model: "m\033[2J"
                                                          engines { engine: "e\nx" }
                                                        })pb");
  for (const auto& text :
       {RenderStatus(status, {}), RenderEngines(status, {}), RenderVersions(status, {})}) {
    CHECK(text.find('\033') == std::string::npos);
    CHECK(text.find("e?x") != std::string::npos);
  }
}

v1::GetPlanResponse Plan() {
  return Parse<v1::GetPlanResponse>(R"pb(
    model: "llama"
    digest: "\001\253"
    tensors {
      tensor: "model.norm.weight"
      shape: 4096
      boxes {
        source: "actor 0"
        target: "engine e0 tp 0"
        param: "model.norm.weight"
        source_box { origin: 0 extent: 4096 }
        target_box { origin: 0 extent: 4096 }
        bytes: 8192
      }
    }
    tensors {
      tensor: "model.layers.0.self_attn.q_proj.weight"
      shape: 4096
      shape: 4096
      boxes {
        source: "actor 0"
        target: "engine e0 tp 0"
        param: "model.layers.0.self_attn.qkv_proj.weight"
        source_box { origin: 0 origin: 0 extent: 1024 extent: 4096 }
        target_box { origin: 0 origin: 0 extent: 1024 extent: 4096 }
        bytes: 8388608
      }
      boxes {
        source: "actor 1"
        target: "engine e0 tp 0"
        param: "model.layers.0.self_attn.qkv_proj.weight"
        source_box { origin: 1024 origin: 0 extent: 1024 extent: 4096 }
        target_box { origin: 1024 origin: 0 extent: 1024 extent: 4096 }
        bytes: 8388608
      }
    }
    tensors { tensor: "model.rotary.inv_freq" shape: 64 }
    pairs {
      source: "actor 0"
      target: "engine e0 tp 0"
      path: "shm"
      reason: "both in host memory of this host"
      boxes: 2
      bytes: 8396800
    }
    pairs {
      source: "actor 1"
      target: "engine e0 tp 0"
      path: "shm"
      reason: "both in host memory of this host"
      boxes: 1
      bytes: 8388608
    }
    total_tensors: 3
    total_boxes: 3
    total_bytes: 16785408
    windows: 1
    predicted_seconds: 0.0054
    prediction_basis: "last sync 3.1 GB/s"
    compile_us: 12300
  )pb");
}

TEST_CASE("a plan shows totals, bytes per pair with path and reason, and boxes per tensor") {
  CHECK(RenderPlan(Plan(), false, {}) ==
        R"(plan of model llama, digest 01ab, compiled in 12.3 ms
3 tensors, 3 boxes, 16.01 MiB landed in 1 windows, predicted 5.4 ms (last sync 3.1 GB/s)

FROM     TO              PATH  BOXES     BYTES  REASON
actor 0  engine e0 tp 0  shm       2  8.01 MiB  both in host memory of this host
actor 1  engine e0 tp 0  shm       1  8.00 MiB  both in host memory of this host

TENSOR                                  SHAPE         BOXES      BYTES  PARAMETERS
model.norm.weight                       [4096]            1   8.00 KiB  model.norm.weight
model.layers.0.self_attn.q_proj.weight  [4096, 4096]      2  16.00 MiB  model.layers.0.self_attn.qkv_proj.weight
model.rotary.inv_freq                   [64]              0        0 B  -
)");
}

TEST_CASE("a pair on two devices says so") {
  v1::GetPlanResponse plan = Plan();
  plan.mutable_pairs(1)->set_source_device("host.1");
  plan.mutable_pairs(1)->set_target_device("host");
  const std::string text = RenderPlan(plan, false, {});
  CHECK(text.find("2  8.01 MiB  both in host memory of this host\n") != std::string::npos);
  CHECK(text.find("8.00 MiB  both in host memory of this host (host.1 to host)\n") !=
        std::string::npos);
}

TEST_CASE("a plan lists every box when asked") {
  v1::GetPlanResponse plan = Plan();
  plan.mutable_pairs()->Clear();
  plan.mutable_tensors()->DeleteSubrange(0, 1);
  plan.set_cached(true);
  const std::string expected =
      R"(plan of model llama, digest 01ab, from the cache (compiled in 12.3 ms)
3 tensors, 3 boxes, 16.01 MiB landed in 1 windows, predicted 5.4 ms (last sync 3.1 GB/s)

tensor model.layers.0.self_attn.q_proj.weight [4096, 4096]
  FROM     SOURCE BOX           TO              PARAMETER                                 TARGET BOX              BYTES
  actor 0  [0:1024, 0:4096]     engine e0 tp 0  model.layers.0.self_attn.qkv_proj.weight  [0:1024, 0:4096]     8.00 MiB
  actor 1  [1024:2048, 0:4096]  engine e0 tp 0  model.layers.0.self_attn.qkv_proj.weight  [1024:2048, 0:4096]  8.00 MiB

tensor model.rotary.inv_freq [64]
  skipped by a rule

2 of 3 tensors listed: choose with --tensor, raise --limit
)";
  CHECK(RenderPlan(plan, true, {}) == expected);
  CHECK(RenderPlan(plan, false, {.wide = true}) == expected);
  plan.set_staging_bytes(192u << 20);
  CHECK(RenderPlan(plan, true, {})
            .find("\nstaging of what is sent: at most 192.00 MiB of each device, beside NCCL's "
                  "own\n") != std::string::npos);
  plan.set_stage_bytes(256u << 20);
  CHECK(RenderPlan(plan, true, {})
            .find("\nstages of an engine rank: at most 256.00 MiB of its device\n") !=
        std::string::npos);
}

TEST_CASE("the daemon is healthy when it does not drain and its workers are attached") {
  v1::GetStatusResponse status = Busy();
  CHECK(JudgeDaemon(status).healthy);
  CHECK(JudgeDaemon(status).detail == "weightd 0.1.0, 1 worker");
  status.mutable_workers(0)->set_attached(false);
  CHECK_FALSE(JudgeDaemon(status).healthy);
  CHECK(JudgeDaemon(status).detail == "worker host is not attached (last exit: signal 9)");
  status = Busy();
  status.set_draining(true);
  CHECK_FALSE(JudgeDaemon(status).healthy);
}

TEST_CASE("a worker that a client has started is shown with its owner") {
  v1::GetStatusResponse status = Busy();
  v1::WorkerStatus* worker = status.add_workers();
  worker->set_device("host.1");
  worker->set_attached(true);
  worker->set_owner("actor 0 (pid 71 on host a)");
  CHECK(
      RenderStatus(status, {})
          .find(
              "WORKER  STATE      PID  MEMBERS    MAPPED  RESTARTS  LAST EXIT  STARTED BY\n"
              "host    attached  4711        6  1.50 GiB         1  signal 9   daemon\n"
              "host.1  attached     -        0       0 B         0  -          actor 0 (pid 71 on "
              "host a)\n") != std::string::npos);
  CHECK(JudgeDaemon(status).detail ==
        "weightd 0.1.0, 2 workers; host.1 (started by actor 0 (pid 71 on host a))");
  worker->set_attached(false);
  CHECK(JudgeDaemon(status).detail ==
        "worker host.1 (started by actor 0 (pid 71 on host a)) is not attached");
}

TEST_CASE("an engine is healthy when all its replicas are ready") {
  v1::GetStatusResponse status = Busy();
  const Health e0 = JudgeEngine(status, "e0");
  CHECK(e0.healthy);
  CHECK(e0.detail == "engine e0 dp 0 of model llama is SERVING with version 7");
  const Health torn = JudgeEngine(status, "engine-one");
  CHECK_FALSE(torn.healthy);
  CHECK(torn.detail == "engine engine-one dp 1 of model llama is POISONED: a peer is gone");
  const Health unknown = JudgeEngine(status, "e9");
  CHECK_FALSE(unknown.healthy);
  CHECK(unknown.detail == "no engine is called e9; known: e0, engine-one");
  status.mutable_models(0)->mutable_engines(1)->set_engine("e0");
  CHECK_FALSE(JudgeEngine(status, "e0").healthy);
  CHECK_FALSE(JudgeEngine({}, "e0").healthy);
}

}  // namespace
}  // namespace weightd::ctl
