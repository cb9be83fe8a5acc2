// A rule file bound to one model: which rule places which tensor, ready to be lowered per rank.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "daemon/layout/loader.h"
#include "daemon/layout/loader_op.h"
#include "daemon/layout/model_scope.h"
#include "daemon/layout/rule_file.h"

namespace weightd {

/// A parameter that some rank of the engine has.
struct LogicalParam {
  std::string name;
  uint32_t first = 0;  ///< its sources are sources[first, first + count)
  uint32_t count = 0;
  bool optional = false;  ///< engines may lack it
};

/// One source tensor and what happens to it.
struct SourceBinding {
  uint32_t tensor = 0;  ///< position in the table
  uint32_t op = 0;      ///< position in BoundRules::ops
  int64_t expert = -1;  ///< which expert it is; -1 if it is not one
};

/// The result of binding. Sources of one parameter follow each other; parameters are in layer
/// order.
struct BoundRules {
  std::shared_ptr<const RuleFile> file;
  Symbols symbols;
  std::vector<std::string> names;  ///< of the table
  std::vector<BoundOp> ops;        ///< distinct ones; many tensors share one
  std::vector<LogicalParam> params;
  std::vector<SourceBinding> sources;
  std::vector<uint32_t> skipped;
};

/// Makes the loader that lowers `rules`. `reported` are the names of a rank that is expected to be
/// lowered often; any other works too.
std::shared_ptr<const BoundLoader> MakeBoundLoader(BoundRules rules,
                                                   std::span<const ParamInfo> reported);

/// Finds the rule of every tensor. \error see Loader::Bind
StatusOr<BoundRules> BindRules(std::shared_ptr<const RuleFile> file, const TensorTable& table,
                               std::string_view config_json, std::span<const ParamInfo> reported);

/// "INVALID_ARGUMENT" error `status` with the tensor's name at its end and in its fields.
Status NameTensor(const Status& status, std::string_view tensor);

}  // namespace weightd
