#include "daemon/plan/rounds.h"

#include <utility>

namespace weightd {

std::vector<RoundLayout> SplitRounds(const RankLayout& layout) {
  std::vector<RoundLayout> rounds(NumRounds(NumStages(layout.params)));
  for (RoundLayout& round : rounds) round.layout.coordinates = layout.coordinates;
  std::vector<uint32_t> position(layout.params.size());  // in its round
  for (uint32_t i = 0; i < layout.params.size(); ++i) {
    const ParamInfo& param = layout.params[i];
    if (param.kind == ParamKind::kOpaque || !param.alias_of.empty()) continue;
    RoundLayout& round = rounds[RoundOf(param)];
    position[i] = static_cast<uint32_t>(round.params.size());
    round.params.push_back(i);
    round.layout.params.push_back(param);
  }
  for (const Write& write : layout.writes) {
    std::vector<Write>& writes = rounds[RoundOf(layout.params[write.param])].layout.writes;
    writes.push_back(write);
    writes.back().param = position[write.param];
  }
  return rounds;
}

}  // namespace weightd
