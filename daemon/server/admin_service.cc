#include "daemon/server/admin_service.h"

#include <algorithm>

#include "daemon/base/version.h"
#include "daemon/server/report_proto.h"
#include "daemon/wire/convert.h"

namespace weightd {
namespace {

constexpr uint32_t kDefaultTensors = 200;
// What a copy of host memory with a cast and two digests reaches on two cores; used until a sync
// has been measured.
constexpr double kDefaultBytesPerSecond = 1.5e9;

v1::ModelStatus Describe(const ModelView& view) {
  v1::ModelStatus status;
  status.set_model(view.name);
  status.set_highest_version(view.highest_version);
  if (view.group.has_value()) {
    v1::ActorGroupStatus* actors = status.mutable_actors();
    actors->set_group(view.group->id);
    actors->set_world_size(static_cast<uint32_t>(view.group->world_size));
    const auto& ranks = view.group->ranks;
    actors->set_registered(static_cast<uint32_t>(
        std::count_if(ranks.begin(), ranks.end(), [](const auto& r) { return r != nullptr; })));
    if (view.group->table != nullptr) {
      actors->set_tensors(static_cast<uint32_t>(view.group->table->size()));
    }
  }
  for (const Replica& replica : view.replicas) {
    v1::EngineStatus* engine = status.add_engines();
    engine->set_engine(replica.engine);
    engine->set_dp_rank(static_cast<uint32_t>(replica.dp_rank));
    engine->set_state(static_cast<v1::EngineState>(replica.state));
    engine->set_ready(IsReady(replica.state));
    engine->set_version(replica.version);
    engine->set_architecture(replica.model.architecture);
    engine->set_profile(replica.model.profile);
    engine->set_ranks(static_cast<uint32_t>(replica.model.num_ranks));
    engine->set_registered(static_cast<uint32_t>(replica.ranks.size()));
    if (!replica.ranks.empty()) {
      engine->set_params(static_cast<uint32_t>(replica.ranks.begin()->second->params.size()));
    }
    for (const auto& [key, rank] : replica.ranks) {
      engine->set_stages(std::max(engine->stages(), rank->num_stages));
      engine->set_staged_bytes(std::max(engine->staged_bytes(), rank->staged_bytes));
    }
    if (!replica.error.ok()) *engine->mutable_error() = ToProto(replica.error);
    engine->set_loader(replica.loader);
  }
  if (view.sync.running) {
    v1::SyncStatus* sync = status.mutable_sync();
    sync->set_version(view.sync.version);
    *sync->mutable_attempt() = ToProto(view.sync.progress.attempt);
    sync->set_phase(static_cast<v1::Phase>(
        std::max(static_cast<int>(view.sync.progress.phase), static_cast<int>(Phase::kAdmit))));
    sync->set_bytes_done(view.sync.progress.bytes_done);
    sync->set_bytes_total(view.sync.progress.bytes_total);
    sync->set_elapsed_us(view.sync.elapsed_us);
    sync->set_bytes_per_second(view.sync.bytes_per_second);
    for (const auto& [phase, micros] : view.sync.phases) {
      v1::PhaseTime* time = sync->add_phases();
      time->set_phase(static_cast<v1::Phase>(phase));
      time->set_duration_us(micros);
    }
    sync->set_waiting_for(view.sync.waiting_for);
  }
  for (const SyncReport& report : view.history) *status.add_history() = ToProto(report);
  return status;
}

v1::PlannedPair Pair(const PathChoice& choice, uint64_t boxes, uint64_t bytes) {
  v1::PlannedPair pair;
  pair.set_path(std::string(Name(choice.path)));
  pair.set_reason(choice.reason);
  pair.set_boxes(boxes);
  pair.set_bytes(bytes);
  return pair;
}

void DescribePairs(const PlanView& view, v1::GetPlanResponse& response) {
  for (size_t i = 0; i < view.plans.size(); ++i) {
    const ReplicaPlan& plan = *view.plans[i];
    const CompiledPlan& compiled = *plan.compiled;
    for (size_t target = 0; target < view.replicas[i].targets.size(); ++target) {
      for (size_t actor = 0; actor < compiled.num_actors; ++actor) {
        const PairTraffic& traffic = compiled.pair(actor, target);
        if (traffic.boxes == 0) continue;
        const std::pair devices(plan.worker->source_devices[actor],
                                plan.worker->target_devices[target]);
        const int first = response.pairs_size();
        if (traffic.pulled_boxes < traffic.boxes) {
          *response.add_pairs() = Pair(plan.paths.at(devices), traffic.boxes - traffic.pulled_boxes,
                                       traffic.bytes - traffic.pulled_bytes);
        }
        if (traffic.pulled_boxes > 0) {
          *response.add_pairs() =
              Pair(plan.pulls.at(devices), traffic.pulled_boxes, traffic.pulled_bytes);
        }
        for (int p = first; p < response.pairs_size(); ++p) {
          v1::PlannedPair& pair = *response.mutable_pairs(p);
          pair.set_source(view.group.ranks[actor]->label);
          pair.set_target(view.replicas[i].targets[target].rank->label);
          pair.set_source_device(devices.first);
          pair.set_target_device(devices.second);
        }
      }
    }
    for (const TargetView& target : view.replicas[i].targets) {
      response.set_stage_bytes(std::max(response.stage_bytes(), target.rank->staged_bytes));
    }
    response.set_total_boxes(response.total_boxes() + compiled.boxes);
    response.set_total_bytes(response.total_bytes() + compiled.bytes);
    response.set_staging_bytes(std::max(response.staging_bytes(), plan.worker->wire_bytes));
    response.set_windows(response.windows() + static_cast<uint32_t>(compiled.windows));
  }
}

void DescribeBoxes(const PlanView& view, size_t index,
                   std::map<uint32_t, v1::PlannedTensor*>& listed) {
  const ReplicaPlan& plan = *view.plans[index];
  for (size_t target = 0; target < plan.resolved->layouts.size(); ++target) {
    const RankLayout& layout = *plan.resolved->layouts[target];
    const RankPlan rank =
        EnumerateRank(*view.group.table, plan.compiled->grid, layout, plan.worker->limits);
    for (const Copy& copy : rank.copies) {
      const Write& write = layout.writes[copy.write];
      const auto it = listed.find(write.tensor);
      if (write.zero_fill || it == listed.end()) continue;
      v1::PlannedBox* box = it->second->add_boxes();
      box->set_source(view.group.ranks[copy.source_rank]->label);
      box->set_target(view.replicas[index].targets[target].rank->label);
      box->set_param(layout.params[write.param].name);
      *box->mutable_source_box() = ToProto(copy.source);
      *box->mutable_target_box() = ToProto(copy.target);
      box->set_bytes(static_cast<uint64_t>(copy.target.num_elements()) *
                     SizeBytes(layout.params[write.param].dtype));
    }
  }
}

grpc::Status ToGrpc(const Status& status) {
  return {static_cast<grpc::StatusCode>(status.code()), Message(status),
          ToProto(status).SerializeAsString()};
}

}  // namespace

v1::GetPlanResponse DescribePlan(const PlanView& view, const std::string& tensor, uint32_t limit) {
  v1::GetPlanResponse response;
  const TensorTable& table = *view.group.table;
  response.set_total_tensors(static_cast<uint32_t>(table.size()));
  DescribePairs(view, response);
  std::vector<uint32_t> chosen;
  const size_t most = limit == 0 ? kDefaultTensors : limit;
  for (uint32_t i = 0; i < table.size() && chosen.size() < most; ++i) {
    if (table[i].name.find(tensor) != std::string::npos) chosen.push_back(i);
  }
  std::map<uint32_t, v1::PlannedTensor*> listed;
  for (uint32_t i : chosen) {
    v1::PlannedTensor* planned = response.add_tensors();
    planned->set_tensor(table[i].name);
    for (int64_t extent : table[i].shape) planned->add_shape(extent);
    listed[i] = planned;
  }
  for (size_t i = 0; i < view.plans.size(); ++i) DescribeBoxes(view, i, listed);
  const bool measured = view.bytes_per_second > 0;
  const double rate = measured ? view.bytes_per_second : kDefaultBytesPerSecond;
  response.set_predicted_seconds(static_cast<double>(response.total_bytes()) / rate);
  response.set_prediction_basis(
      fmt::format("{} {:.1f} GB/s", measured ? "last sync" : "default host rate", rate * 1e-9));
  const Digest128& digest = view.plans.front()->worker->digest;
  response.set_digest(digest.data(), digest.size());
  return response;
}

void AdminService::DescribeWorkers(v1::GetStatusResponse& response) {
  const std::vector<std::string> missing = coordinator_.MissingWorkers();
  for (const auto& [device, supervisor] : supervisors_) {
    const WorkerSupervisor::View worker = supervisor->view();
    const auto [mapped, members] = workers_.Mapped(device);
    v1::WorkerStatus* status = response.add_workers();
    status->set_device(device);
    status->set_pid(static_cast<uint32_t>(worker.pid));
    status->set_attached(std::find(missing.begin(), missing.end(), device) == missing.end());
    status->set_restarts(worker.restarts);
    status->set_mapped_bytes(mapped);
    status->set_members(members);
    status->set_last_exit(worker.last_exit);
  }
  for (const SpawnedWorkers::View& worker : coordinator_.SpawnedViews()) {
    const auto [mapped, members] = workers_.Mapped(worker.device);
    v1::WorkerStatus* status = response.add_workers();
    status->set_device(worker.device);
    status->set_pid(worker.pid);
    status->set_attached(worker.attached);
    status->set_restarts(worker.restarts);
    status->set_mapped_bytes(mapped);
    status->set_members(members);
    status->set_last_exit(worker.last_exit);
    status->set_owner(worker.owner.empty() ? "a client that has ended" : worker.owner);
  }
}

grpc::ServerUnaryReactor* AdminService::GetStatus(grpc::CallbackServerContext* call,
                                                  const v1::GetStatusRequest* request,
                                                  v1::GetStatusResponse* response) {
  response->set_daemon_version(kVersion);
  *response->mutable_protocol() = OurProtocol();
  response->set_epoch(coordinator_.epoch());
  response->set_uptime_us(MicrosSince(start_));
  response->set_draining(draining_);
  DescribeWorkers(*response);
  for (const ModelView& view : coordinator_.Views(request->model())) {
    *response->add_models() = Describe(view);
  }
  grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

grpc::ServerUnaryReactor* AdminService::GetPlan(grpc::CallbackServerContext* call,
                                                const v1::GetPlanRequest* request,
                                                v1::GetPlanResponse* response) {
  grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
  const auto start = Clock::now();
  const StatusOr<PlanView> view = coordinator_.Plan(request->model());
  if (!view.ok()) {
    reactor->Finish(ToGrpc(view.status()));
    return reactor;
  }
  *response = DescribePlan(*view, request->tensor(), request->limit());
  response->set_model(request->model());
  response->set_compile_us(MicrosSince(start));
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

}  // namespace weightd
