#include "client/checkpoint/checkpoint.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <unordered_map>

#include "client/checkpoint/strict_json.h"

namespace weightd {
namespace {

using Json = nlohmann::json;

constexpr char kConfig[] = "config.json";
constexpr char kIndex[] = "model.safetensors.index.json";
constexpr char kSingle[] = "model.safetensors";
constexpr size_t kMostJsonBytes = size_t{64} << 20;

bool IsMissing(const Status& status) { return status.code() == StatusCode::kNotFound; }

StatusOr<Json> ReadJson(const MappedFile& file) {
  if (file.bytes().size() > kMostJsonBytes) {
    return Error(StatusCode::kInvalidArgument, reason::kCheckpoint,
                 "write or download the file again", "{} is too large: {} bytes, at most {}",
                 file.name(), file.bytes().size(), kMostJsonBytes);
  }
  return ParseStrictJson(file.bytes(), file.name());
}

Status WrongIndex(std::string_view reason, const std::string& tensor, const std::string& message) {
  return WithTensor(
      Error(StatusCode::kInvalidArgument, reason,
            "use index and files of one checkpoint: write or download it again", "{}", message),
      tensor);
}

}  // namespace

StatusOr<Checkpoint> Checkpoint::Open(const std::string& directory) {
  WEIGHTD_ASSIGN_OR_RETURN(CheckpointFolder folder, CheckpointFolder::Open(directory));
  Checkpoint checkpoint(std::move(folder));
  WEIGHTD_RETURN_IF_ERROR(checkpoint.ReadConfig());
  WEIGHTD_RETURN_IF_ERROR(checkpoint.ReadFiles());
  checkpoint.ReleasePages();
  return checkpoint;
}

StatusOr<MappedFile> Checkpoint::Map(const std::string& name) const {
  WEIGHTD_ASSIGN_OR_RETURN(ScopedFd file, folder_.OpenFile(name));
  return MappedFile::Map(std::move(file), fmt::format("{}/{}", folder_.path(), name));
}

Status Checkpoint::ReadConfig() {
  WEIGHTD_ASSIGN_OR_RETURN(const MappedFile file, Map(kConfig));
  WEIGHTD_ASSIGN_OR_RETURN(const Json config, ReadJson(file));
  const auto found = config.find("architectures");
  if (found != config.end() && found->is_array()) {
    for (const Json& name : *found) {
      if (name.is_string()) architectures_.push_back(name.get<std::string>());
    }
  }
  if (!architectures_.empty()) return absl::OkStatus();
  return Error(StatusCode::kInvalidArgument, reason::kConfig,
               "add \"architectures\": [NAME] as save_pretrained writes it",
               "{} names no architecture", file.name());
}

Status Checkpoint::ReadFiles() {
  StatusOr<MappedFile> index = Map(kIndex);
  if (index.ok()) return ReadIndex(*index);
  if (!IsMissing(index.status())) return index.status();
  Status status = AddFile(kSingle);
  if (!IsMissing(status)) return status;
  return Error(StatusCode::kNotFound, reason::kCheckpoint,
               "push a directory as save_pretrained writes it; convert .bin files to safetensors",
               "neither {} nor {} in {}", kIndex, kSingle, folder_.path());
}

Status Checkpoint::ReadIndex(const MappedFile& index) {
  WEIGHTD_ASSIGN_OR_RETURN(const Json json, ReadJson(index));
  const auto found = json.find("weight_map");
  const bool sound =
      found != json.end() && found->is_object() && !found->empty() &&
      std::all_of(found->begin(), found->end(), [](const Json& file) { return file.is_string(); });
  if (!sound) {
    return Error(StatusCode::kInvalidArgument, reason::kCheckpoint,
                 "write or download the file again",
                 "{} has no weight_map from tensors to file names", index.name());
  }
  std::map<std::string, std::vector<std::string>> wanted;
  for (const auto& [tensor, file] : found->items()) {
    wanted[file.get<std::string>()].push_back(tensor);
  }
  if (!wanted.contains(kSingle) && !IsMissing(folder_.OpenFile(kSingle).status())) {
    return Error(StatusCode::kInvalidArgument, reason::kCheckpoint, "remove the one that is stale",
                 "{} lies beside an index that does not name it: {}", kSingle, index.name());
  }
  for (const auto& [file, tensors] : wanted) {
    const size_t first = tensors_.size();
    if (const Status status = AddFile(file); !status.ok()) {
      return WithTensor(status, tensors.front());
    }
    std::unordered_map<std::string_view, bool> held;
    for (size_t i = first; i < tensors_.size(); ++i) held.emplace(tensors_[i].info.name, false);
    for (const std::string& tensor : tensors) {
      const auto entry = held.find(tensor);
      if (entry == held.end()) {
        return WrongIndex(reason::kMissingTensor, tensor,
                          fmt::format("{} says that {} holds a tensor that it does not hold: {}",
                                      index.name(), file, tensor));
      }
      entry->second = true;
    }
    for (const auto& [tensor, listed] : held) {
      if (listed) continue;
      return WrongIndex(reason::kUnknownTensor, std::string(tensor),
                        fmt::format("{} holds a tensor that {} does not place there: {}", file,
                                    index.name(), tensor));
    }
  }
  return absl::OkStatus();
}

Status Checkpoint::AddFile(const std::string& name) {
  WEIGHTD_ASSIGN_OR_RETURN(MappedFile file, Map(name));
  WEIGHTD_ASSIGN_OR_RETURN(std::vector<StoredTensor> stored,
                           ReadSafetensors(file.bytes(), file.name()));
  const auto* base = reinterpret_cast<const std::byte*>(file.bytes().data());
  for (StoredTensor& tensor : stored) {
    size_bytes_ += tensor.size_bytes;
    tensors_.push_back({std::move(tensor.info), files_.size(), base + tensor.begin});
  }
  files_.push_back(std::move(file));
  return absl::OkStatus();
}

void Checkpoint::ReleasePages() const {
  for (const MappedFile& file : files_) file.ReleasePages();
}

Status Checkpoint::CheckUnchanged() const {
  for (const MappedFile& file : files_) {
    if (file.Unchanged()) continue;
    return Error(StatusCode::kAborted, reason::kCheckpoint,
                 "push the directory again when nobody writes to it",
                 "a file was written to while it was pushed: {}", file.name());
  }
  return absl::OkStatus();
}

}  // namespace weightd
