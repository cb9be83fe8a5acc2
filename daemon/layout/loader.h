// Loaders: declarative rule files that say which block of which Hugging Face tensor lands where in
// an engine's parameters. Parsed and evaluated here; the files live in loaders/.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/layout/tensor_layout.h"

namespace weightd {

/// A rule file, evaluated for one (tensor table, model config, architecture). Knows for every
/// source tensor which rule applies; lowers rank by rank. Thread safety: immutable.
class BoundLoader {
 public:
  virtual ~BoundLoader() = default;

  /// Lowers the rules for one engine rank.
  /// If `reported` is empty, parameters (names, shapes) are derived from the rules and get dtype
  /// float32, kind raw, in layer order. Otherwise the result's params equal `reported`, in its
  /// order, and every shape that the rules imply is compared with the reported one. Aliased and
  /// opaque parameters are not written. \error INVALID_ARGUMENT SHAPE / DIVISIBILITY /
  /// MISSING_TENSOR / UNCOVERED_PARAMETER / UNKNOWN_TENSOR, each naming the
  ///        tensor or parameter, the numbers and the remedy
  virtual StatusOr<RankLayout> Lower(const EngineCoordinates& coordinates,
                                     std::span<const ParamInfo> reported) const = 0;

  /// Source tensors that a rule skips on purpose, ascending positions in the table.
  virtual const std::vector<uint32_t>& skipped() const = 0;
};

/// One parsed rule file.
/// Thread safety: immutable.
class Loader {
 public:
  virtual ~Loader() = default;

  /// Parses a rule file. `origin` names it in errors ("loaders/llama.rules" or a path).
  /// \error INVALID_ARGUMENT RULE_FILE with origin:line for anything malformed
  static StatusOr<std::shared_ptr<const Loader>> Parse(std::string_view text, std::string origin);

  virtual const std::string& name() const = 0;    ///< file stem, e.g. "llama"
  virtual const std::string& origin() const = 0;  ///< "embedded:llama" or a path
  virtual const std::vector<std::string>& architectures() const = 0;  ///< with aliases
  virtual const std::vector<std::string>& profiles()
      const = 0;  ///< e.g. {"vllm-0.6.3", "vllm-0.32"}

  /// The first parameter that weightd would have to write but no rule can; nullptr if there is
  /// none. Looks at names alone.
  virtual const ParamInfo* FindForeign(std::span<const ParamInfo> reported) const = 0;

  /// Finds the one rule of each source tensor and evaluates the config's symbols. `config_json` is
  /// the model's Hugging Face config. `reported` are the parameters of any one rank (empty if
  /// unknown): whether the head is tied is taken from them when they are given, from the config
  /// otherwise. \error INVALID_ARGUMENT UNKNOWN_TENSOR (with the nearest known names) /
  /// AMBIGUOUS_RULE / CONFIG / DUPLICATE_TENSOR
  virtual StatusOr<std::shared_ptr<const BoundLoader>> Bind(
      const TensorTable& table, std::string_view config_json, std::string_view architecture,
      std::string_view profile, std::span<const ParamInfo> reported) const = 0;
};

/// Whether weightd writes this parameter by itself: it is neither opaque nor an alias.
bool Written(const ParamInfo& param);

/// Whether `profile` is one of `declared`, or a patch release of one: "vllm-0.32.0" is "vllm-0.32".
bool MatchProfile(std::string_view profile, const std::vector<std::string>& declared);

/// The rule files a process knows: the embedded ones and those of a directory, which win over
/// embedded ones with the same architecture and profile. Thread safety: immutable.
class LoaderRegistry {
 public:
  /// `directory` may be empty. Reads every *.rules file in it.
  /// \error INVALID_ARGUMENT RULE_FILE for a malformed file, NOT_FOUND for a directory that does
  /// not exist
  static StatusOr<std::shared_ptr<const LoaderRegistry>> Create(const std::string& directory);

  /// \error NOT_FOUND UNKNOWN_ARCHITECTURE listing the known ones and the nearest
  /// \error NOT_FOUND UNKNOWN_PROFILE listing the profiles of that architecture
  StatusOr<std::shared_ptr<const Loader>> Find(std::string_view architecture,
                                               std::string_view profile) const;

  /// Checks what an engine reports before any trainer is known: that its profile is described, and
  /// that its parameters do not have the names of another profile instead.
  /// \error as Find; INVALID_ARGUMENT UNKNOWN_PROFILE naming the profiles that the names fit
  Status CheckProfile(std::string_view architecture, std::string_view profile,
                      std::span<const ParamInfo> reported) const;

  const std::vector<std::shared_ptr<const Loader>>& loaders() const { return loaders_; }

 private:
  std::vector<std::shared_ptr<const Loader>> loaders_;
};

}  // namespace weightd
