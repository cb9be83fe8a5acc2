#include "daemon/layout/loader.h"

#include <algorithm>

#include "daemon/layout/bound_loader.h"
#include "daemon/layout/rule_file.h"

namespace weightd {
namespace {

class RuleLoader final : public Loader {
 public:
  explicit RuleLoader(RuleFile file) : file_(std::make_shared<const RuleFile>(std::move(file))) {}

  const std::string& name() const override { return file_->name; }
  const std::string& origin() const override { return file_->origin; }
  const std::vector<std::string>& architectures() const override { return file_->architectures; }
  const std::vector<std::string>& profiles() const override { return file_->profiles; }

  const ParamInfo* FindForeign(std::span<const ParamInfo> reported) const override {
    const auto made = [this](const ParamInfo& param) {
      return std::any_of(file_->rules.begin(), file_->rules.end(), [&param](const Rule& rule) {
        return !rule.skips() && rule.target.Makes(param.name);
      });
    };
    const auto foreign =
        std::find_if(reported.begin(), reported.end(),
                     [&made](const ParamInfo& param) { return Written(param) && !made(param); });
    return foreign == reported.end() ? nullptr : &*foreign;
  }

  StatusOr<std::shared_ptr<const BoundLoader>> Bind(
      const TensorTable& table, std::string_view config_json, std::string_view architecture,
      std::string_view profile, std::span<const ParamInfo> reported) const override {
    if (std::find(architectures().begin(), architectures().end(), architecture) ==
        architectures().end()) {
      return Error(StatusCode::kInvalidArgument, reason::kUnknownArchitecture,
                   "choose the loader with LoaderRegistry::Find",
                   "loader {} does not describe architecture {}", name(), architecture);
    }
    if (!MatchProfile(profile, profiles())) {
      return Error(StatusCode::kInvalidArgument, reason::kUnknownProfile,
                   "choose the loader with LoaderRegistry::Find",
                   "loader {} does not describe engine profile {} (it does: {})", name(), profile,
                   fmt::join(profiles(), ", "));
    }
    // The bound loader keeps the parsed file alive beyond this object.
    WEIGHTD_ASSIGN_OR_RETURN(BoundRules rules, BindRules(file_, table, config_json, reported));
    return MakeBoundLoader(std::move(rules), reported);
  }

 private:
  std::shared_ptr<const RuleFile> file_;
};

}  // namespace

bool Written(const ParamInfo& param) {
  return param.alias_of.empty() && param.kind != ParamKind::kOpaque;
}

bool MatchProfile(std::string_view profile, const std::vector<std::string>& declared) {
  return std::any_of(declared.begin(), declared.end(), [profile](const std::string& one) {
    return profile == one || (profile.starts_with(one) && profile[one.size()] == '.');
  });
}

StatusOr<std::shared_ptr<const Loader>> Loader::Parse(std::string_view text, std::string origin) {
  WEIGHTD_ASSIGN_OR_RETURN(RuleFile file, RuleFile::Parse(text, std::move(origin)));
  return std::make_shared<const RuleLoader>(std::move(file));
}

}  // namespace weightd
