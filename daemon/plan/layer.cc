#include <algorithm>
#include <numeric>
#include <string_view>
#include <tuple>
#include <unordered_map>

#include "daemon/plan/transfer_plan.h"

namespace weightd {
namespace {

/// Longest run of digits that is taken for a layer number; fits an int64.
constexpr size_t kMaxDigits = 18;

bool IsLayerNumber(std::string_view component) {
  return !component.empty() && component.size() <= kMaxDigits &&
         component.find_first_not_of("0123456789") == std::string_view::npos;
}

}  // namespace

LayerKey LayerOf(const std::string& name) {
  for (size_t begin = 0; begin < name.size();) {
    const size_t end = std::min(name.find('.', begin), name.size());
    const std::string_view component = std::string_view(name).substr(begin, end - begin);
    if (IsLayerNumber(component)) {
      return {name.substr(0, begin), std::stoll(std::string(component))};
    }
    begin = end + 1;
  }
  return {name, -1};
}

std::vector<uint32_t> LayerOrder(std::span<const ParamInfo> params) {
  std::unordered_map<std::string, uint32_t> first_of_prefix;
  std::vector<std::tuple<uint32_t, int64_t, uint32_t>> keys;
  keys.reserve(params.size());
  for (uint32_t i = 0; i < params.size(); ++i) {
    LayerKey layer = LayerOf(params[i].name);
    if (layer.index < 0) {
      keys.emplace_back(i, -1, i);
      continue;
    }
    const auto found = first_of_prefix.try_emplace(std::move(layer.prefix), i).first;
    keys.emplace_back(found->second, layer.index, i);
  }
  std::sort(keys.begin(), keys.end());
  std::vector<uint32_t> order;
  order.reserve(keys.size());
  for (const auto& key : keys) order.push_back(std::get<2>(key));
  return order;
}

}  // namespace weightd
