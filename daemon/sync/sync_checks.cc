// What a sync refuses, and how it compares digests. No waiting here.
#include <algorithm>

#include "daemon/base/failpoint.h"
#include "daemon/layout/digest.h"
#include "daemon/sync/sync_session.h"

namespace weightd {

bool GroupView::complete() const {
  return !ranks.empty() &&
         std::all_of(ranks.begin(), ranks.end(), [](const auto& rank) { return rank != nullptr; });
}

const char* ReplicaView::verified() const {
  for (const TargetView& target : targets) {
    for (const ParamInfo& param : target.rank->params) {
      if (param.kind == ParamKind::kDerived) return "loadable";
    }
  }
  return "memory";
}

uint32_t ReplicaView::num_rounds() const {
  uint32_t rounds = 1;
  for (const TargetView& target : targets) rounds = std::max(rounds, target.num_rounds());
  return rounds;
}

Status ReplicaView::CheckCopyable() const {
  if (num_rounds() == 1) return absl::OkStatus();
  return WithRank(
      Error(StatusCode::kFailedPrecondition, reason::kStaged,
            "sync: the engine takes part in the next one; or let it receive all of them in one "
            "stage (a larger stage_bytes)",
            "cannot catch up from another engine or a retained copy, since {} stages of "
            "derived or pulled parameters share their memory: {}",
            num_rounds(), label()),
      label());
}

Status SyncSession::CheckRanksPresent() const {
  if (group_.superseded) {
    return Error(StatusCode::kAborted, reason::kFenced,
                 "stop this trainer, or start it again to take over",
                 "a newer trainer has taken over this model: group={}", group_.id);
  }
  for (size_t rank = 0; rank < group_.lost.size(); ++rank) {
    if (!group_.lost[rank]) continue;
    const std::string label = fmt::format("actor {}", rank);
    return WithPeer(Error(StatusCode::kUnavailable, reason::kPeerLost,
                          "start the trainer again (all ranks), then sync",
                          "a trainer rank is gone: {}", label),
                    label);
  }
  return absl::OkStatus();
}

Status SyncSession::NoEngineError() const {
  const std::string incomplete = host_.IncompleteReplica();
  if (incomplete.empty()) {
    return Error(StatusCode::kFailedPrecondition, reason::kNoEngine,
                 "start an inference engine with this model name, then sync again",
                 "no engine is registered for this model");
  }
  return WithPeer(Error(StatusCode::kFailedPrecondition, reason::kNoEngine,
                        "start the missing ranks of the named engine, then sync again",
                        "no engine of this model has all of its ranks: {}", incomplete),
                  incomplete);
}

Status SyncSession::CheckRequests() {
  const std::lock_guard lock(requests_mu_);
  const SyncRequest& first = requests_.front();
  for (const SyncRequest& request : requests_) {
    const std::string label = fmt::format("actor {}", request.rank);
    if (!request.refused.ok()) return WithRank(request.refused, label);
    if (request.version != first.version || request.require_replicas != first.require_replicas ||
        request.check_replicas != first.check_replicas) {
      return WithRank(
          Error(StatusCode::kInvalidArgument, reason::kPlanMismatch,
                "call sync() on every rank with the same arguments",
                "ranks ask for different syncs: actor {} version {} require {} check_replicas {}, "
                "{} version {} require {} check_replicas {}",
                first.rank, first.version, first.require_replicas, first.check_replicas, label,
                request.version, request.require_replicas, request.check_replicas),
          label);
    }
  }
  require_ = first.require_replicas;
  check_replicas_ = first.check_replicas;
  return absl::OkStatus();
}

Status SyncSession::CheckRequired() const {
  size_t viable = 0;
  const ReplicaRun* failed = nullptr;
  for (const ReplicaRun& run : replicas_) {
    if (run.viable()) {
      ++viable;
    } else if (failed == nullptr) {
      failed = &run;
    }
  }
  if (require_ > replicas_.size()) {
    return Error(StatusCode::kFailedPrecondition, reason::kNoEngine,
                 "start more engines, or require fewer",
                 "fewer engines are registered than required: registered={} required={}",
                 replicas_.size(), require_);
  }
  // A replica that died on the way never stops the others; one that cannot be planned stops a sync
  // that requires all.
  const bool planning = phase_ <= Phase::kBuildPlan;
  const size_t needed = require_ > 0 ? require_ : planning ? replicas_.size() : 1;
  if (viable >= needed || failed == nullptr) return absl::OkStatus();
  return failed->error;
}

// Once no replica is left that could commit, nothing is worth going on for.
Status SyncSession::CheckAnyViable() {
  if (!Viable().empty()) return absl::OkStatus();
  const auto failed = std::find_if(replicas_.begin(), replicas_.end(),
                                   [](const ReplicaRun& run) { return !run.viable(); });
  return failed == replicas_.end() ? absl::OkStatus() : failed->error;
}

// Words of several workers add up: each copied boxes that no other did.
Status SyncSession::AddDigests(const TargetDigests& part, std::map<uint32_t, TargetDigests>& sums) {
  const auto [entry, first] = sums.try_emplace(part.target, part);
  if (first) return absl::OkStatus();
  TargetDigests& sum = entry->second;
  if (sum.tensors != part.tensors || sum.words.size() != part.words.size()) {
    return Error(StatusCode::kInternal, reason::kPlanMismatch,
                 "run daemon and workers of one release; report this if they are",
                 "workers digested different tensors of one engine rank: {} and {}",
                 sum.tensors.size(), part.tensors.size());
  }
  for (size_t i = 0; i < sum.words.size(); ++i) sum.words[i] += part.words[i];
  return absl::OkStatus();
}

// Each worker has sent one word per shard that its device and others hold, in the grid's order.
Status SyncSession::CompareShardWords() const {
  std::map<std::string, size_t> next;
  Status status;
  const auto compare = [&](const SourceGrid::ReplicatedShard& shard) {
    std::map<std::string, std::string> holders;  // device -> its ranks
    for (uint32_t rank : shard.ranks) {
      std::string& list = holders[group_.ranks[rank]->device];
      list += (list.empty() ? "" : ", ") + group_.ranks[rank]->label;
    }
    if (holders.size() == 1 || !status.ok()) return;
    std::optional<uint64_t> expected;
    std::string different;
    for (const auto& [device, ranks] : holders) {
      const std::vector<uint64_t>& words = shard_words_.at(device);
      const size_t position = next[device]++;
      if (position >= words.size()) {
        status = WithPeer(
            Error(StatusCode::kInternal, reason::kProtocol, "run daemon and workers of one release",
                  "worker sent too few words of replicated shards: device={} words={}", device,
                  words.size()),
            "worker " + device);
        return;
      }
      if (!expected.has_value()) expected = words[position];
      if (words[position] != *expected) different += (different.empty() ? "" : ", ") + ranks;
    }
    if (different.empty()) return;
    const std::string& name = (*group_.table)[shard.tensor].name;
    status = WithRank(
        WithTensor(Error(StatusCode::kFailedPrecondition, reason::kReplicasDiffer,
                         "make the replicas equal in the trainer (broadcast parameters), or sync "
                         "without check_replicas",
                         "replicated shards differ: tensor={} box={} [{}] differ from [{}]", name,
                         ToString(shard.box), different, holders.begin()->second),
                   name),
        different);
  };
  for (const ReplicaRun& run : replicas_) {
    if (!run.viable() || run.already) continue;
    run.plan->compiled->grid.ForEachReplicated(compare);
    break;  // one replica's plan has the grid of them all
  }
  return status;
}

// Words of several rounds add up, too; a round has only the tensors that it reads.
void SyncSession::AddRound(const TargetDigests& round, TargetDigests& sum) {
  std::map<uint32_t, uint64_t> words;
  uint64_t zeros = 0;
  for (const TargetDigests* part : {&round, &std::as_const(sum)}) {
    for (size_t i = 0; i < part->tensors.size(); ++i) words[part->tensors[i]] += part->words[i];
    zeros += part->words.empty() ? 0 : part->words.back();
  }
  sum.tensors.clear();
  sum.words.clear();
  for (const auto& [tensor, word] : words) {
    sum.tensors.push_back(tensor);
    sum.words.push_back(word);
  }
  sum.words.push_back(zeros);
}

// What one round landed is what was sent; after the last, nothing was left out.
Status SyncSession::CompareDigests(ReplicaRun& run) {
  const bool blind = Mutated("blind_verify");
  for (uint32_t i = 0; i < run.view.targets.size(); ++i) {
    const uint32_t rounds = run.view.targets[i].num_rounds();
    if (round_ >= rounds) continue;
    const TargetDigests& source = run.source_digests[i];
    const TargetDigests& target = run.target_digests[i];
    const std::string& label = run.view.targets[i].rank->label;
    const bool equal = source.tensors == target.tensors && source.words == target.words &&
                       source.words.size() == source.tensors.size() + 1;
    TargetDigests& all = run.digests[i];
    if (equal && round_ > 0) AddRound(source, all);
    if (round_ == 0) all = source;
    const bool complete =
        round_ + 1 < rounds || all.tensors.size() == run.plan->resolved->num_tensors[i];
    if (blind || (equal && complete)) continue;
    std::string tensor = complete ? "zero padding" : "not digested";
    for (size_t k = 0; k < source.tensors.size() && k < target.tensors.size(); ++k) {
      if (source.tensors[k] == target.tensors[k] && source.words[k] == target.words[k]) continue;
      tensor = (*group_.table)[source.tensors[k]].name;
      break;
    }
    return MakeError(StatusCode::kDataLoss,
                     fmt::format("bytes in engine memory differ from the trainer's: tensor={} {}",
                                 tensor, label),
                     {.reason = reason::kVerifyMismatch,
                      .tensor = tensor,
                      .rank = label,
                      .remedy = "sync again; if it repeats, something else writes this memory "
                                "(is the engine paused?)"});
  }
  if (blind || round_ + 1 < run.view.num_rounds()) return absl::OkStatus();
  return host_.CheckRetry(version_, run.plan->resolved->layout_key, CombinedDigest(run));
}

uint64_t SyncSession::CombinedDigest(const ReplicaRun& run) {
  uint64_t digest = 0;
  for (const auto& [index, target] : run.digests) {
    for (uint64_t word : target.words) digest = Mix64(digest ^ word) + index;
  }
  return digest;
}

std::string SyncSession::WaitingFor() const {
  if (phase_ == Phase::kAdmit) {
    std::vector<std::string> missing;
    std::set<int> arrived;
    const std::lock_guard lock(requests_mu_);
    for (const SyncRequest& request : requests_) arrived.insert(request.rank);
    for (int rank = 0; rank < group_.world_size; ++rank) {
      if (!arrived.contains(rank)) missing.push_back(fmt::format("actor {}", rank));
    }
    return fmt::format("{}", fmt::join(missing, ", "));
  }
  for (const ReplicaRun& run : replicas_) {
    for (const TargetView& target : run.view.targets) {
      if (run.waiting.contains(target.rank->member)) return target.rank->label;
    }
    if (!run.running.empty()) return "worker " + *run.running.begin();
  }
  return "";
}

}  // namespace weightd
