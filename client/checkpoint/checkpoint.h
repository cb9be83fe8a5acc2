// A Hugging Face checkpoint directory: config.json and safetensors files, one or, with
// model.safetensors.index.json, several.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "client/checkpoint/folder.h"
#include "client/checkpoint/mapped_file.h"
#include "client/checkpoint/safetensors.h"
#include "daemon/base/status.h"

namespace weightd {

/// Files, mapped, and the tensors in them. Open checks everything that the files say before it
/// returns. Move-only. Thread safety: const functions by any thread.
class Checkpoint {
 public:
  struct Tensor {
    TensorInfo info;
    size_t file = 0;                     ///< position in files()
    const std::byte* address = nullptr;  ///< of the first element, row-major; any alignment
  };

  /// \error NOT_FOUND CHECKPOINT for a missing directory or file; else INVALID_ARGUMENT as
  /// CheckpointFolder and ReadSafetensors say; CONFIG for a config.json that names no architecture;
  /// MISSING_TENSOR, UNKNOWN_TENSOR or DUPLICATE_TENSOR if index and files disagree
  static StatusOr<Checkpoint> Open(const std::string& directory);

  /// What config.json says; not empty.
  const std::vector<std::string>& architectures() const { return architectures_; }
  /// In the order of files() and, in each, of its data. Names are unique.
  const std::vector<Tensor>& tensors() const { return tensors_; }
  const std::vector<MappedFile>& files() const { return files_; }
  uint64_t size_bytes() const { return size_bytes_; }  ///< of all tensors

  void ReleasePages() const;
  /// \error ABORTED CHECKPOINT naming the file that was written to since Open
  Status CheckUnchanged() const;

 private:
  explicit Checkpoint(CheckpointFolder folder) : folder_(std::move(folder)) {}
  StatusOr<MappedFile> Map(const std::string& name) const;
  Status ReadConfig();
  Status ReadFiles();
  Status ReadIndex(const MappedFile& index);
  Status AddFile(const std::string& name);

  CheckpointFolder folder_;
  std::vector<std::string> architectures_;
  std::vector<MappedFile> files_;
  std::vector<Tensor> tensors_;
  uint64_t size_bytes_ = 0;
};

}  // namespace weightd
