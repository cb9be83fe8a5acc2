#include "tests/unit/plan/plan_testing.h"

#include <algorithm>
#include <functional>
#include <map>
#include <numeric>

namespace weightd::testing {
namespace {

constexpr int64_t kUnwritten = -1;
constexpr int64_t kZero = -2;

/// Calls fn with every index of a box, row-major.
void ForEachIndex(const Box& box, const std::function<void(const Dims&)>& fn) {
  if (box.empty()) return;
  Dims index = box.origin;
  while (true) {
    fn(index);
    int dim = box.num_dims() - 1;
    while (dim >= 0 && ++index[dim] == box.end(dim)) {
      index[dim] = box.origin[dim];
      --dim;
    }
    if (dim < 0) return;
  }
}

/// Row-major position of `index` in `box`.
size_t OffsetIn(const Box& box, const Dims& index) {
  int64_t offset = 0;
  for (int i = 0; i < box.num_dims(); ++i) {
    offset = offset * box.extent[i] + index[i] - box.origin[i];
  }
  return static_cast<size_t>(offset);
}

/// A number that no other element of any tensor has.
int64_t ElementNumber(const TensorTable& table, uint32_t tensor, const Dims& index) {
  return (static_cast<int64_t>(tensor) << 32) +
         static_cast<int64_t>(OffsetIn(WholeBox(table[tensor].shape), index));
}

/// Memory of one shard: the numbers of the elements it holds.
std::vector<int64_t> FillShard(const TensorTable& table, uint32_t tensor, const Box& box) {
  std::vector<int64_t> memory(static_cast<size_t>(box.num_elements()));
  ForEachIndex(box, [&](const Dims& index) {
    memory[OffsetIn(box, index)] = ElementNumber(table, tensor, index);
  });
  return memory;
}

/// The source index that lands at `index` of the target.
Dims SourceIndex(const Write& write, const Box& source, const Box& target, const Dims& index) {
  Dims from = source.origin;
  for (int j = 0; j < target.num_dims(); ++j) {
    const int dim = write.source_dim[static_cast<size_t>(j)];
    if (dim >= 0) from[dim] += index[j] - target.origin[j];
  }
  return from;
}

using Memory = std::vector<std::vector<int64_t>>;  // per parameter

Memory EmptyMemory(const RankLayout& layout) {
  Memory memory;
  for (const ParamInfo& param : layout.params) {
    memory.emplace_back(static_cast<size_t>(NumElements(param.shape)), kUnwritten);
  }
  return memory;
}

Memory Expected(const TensorTable& table, const RankLayout& layout) {
  Memory memory = EmptyMemory(layout);
  for (const Write& write : layout.writes) {
    const Box whole = WholeBox(layout.params[write.param].shape);
    ForEachIndex(write.target, [&](const Dims& index) {
      memory[write.param][OffsetIn(whole, index)] =
          write.zero_fill ? kZero
                          : ElementNumber(table, write.tensor,
                                          SourceIndex(write, write.source, write.target, index));
    });
  }
  return memory;
}

/// Runs one copy; returns what is wrong with it.
std::string RunCopy(const TensorTable& table, std::span<const RankShards> shards,
                    const RankLayout& layout, const Copy& copy, Memory& memory) {
  const Write& write = layout.writes[copy.write];
  const Box whole = WholeBox(layout.params[write.param].shape);
  if (!Contains(whole, copy.target)) return "copy leaves its parameter";
  Box held;
  std::vector<int64_t> shard;
  if (!write.zero_fill) {
    if (copy.source_rank >= shards.size()) return "copy names an unknown rank";
    const RankShards& of = shards[copy.source_rank];
    const uint32_t position = of.first[write.tensor] + copy.shard;
    if (position >= of.first[write.tensor + 1]) return "copy names an unknown shard";
    held = of.boxes[of.box_index[position]];
    if (!Contains(held, copy.source)) return "copy leaves its shard";
    for (int j = 0; j < copy.target.num_dims(); ++j) {
      const int dim = write.source_dim[static_cast<size_t>(j)];
      if (copy.target.extent[j] != (dim < 0 ? 1 : copy.source.extent[dim])) {
        return "copy's extents disagree";
      }
    }
    shard = FillShard(table, write.tensor, held);
  }
  std::string fault;
  ForEachIndex(copy.target, [&](const Dims& index) {
    int64_t& element = memory[write.param][OffsetIn(whole, index)];
    if (element != kUnwritten) fault = "element is written twice";
    element = write.zero_fill
                  ? kZero
                  : shard[OffsetIn(held, SourceIndex(write, copy.source, copy.target, index))];
  });
  return fault;
}

std::string WindowFault(const RankLayout& layout, const RankPlan& plan,
                        const WindowLimits& limits) {
  uint32_t next = 0;
  uint64_t total = 0;
  for (const Window& window : plan.windows) {
    if (window.begin != next || window.end <= window.begin) return "windows do not follow on";
    if (window.end - window.begin > limits.operations) return "window has too many operations";
    uint64_t bytes = 0;
    uint64_t smallest = UINT64_MAX;
    for (uint32_t i = window.begin; i < window.end; ++i) {
      const Copy copy = plan.copies[i];
      const uint64_t element = SizeBytes(layout.params[layout.writes[copy.write].param].dtype);
      bytes += static_cast<uint64_t>(copy.target.num_elements()) * element;
      smallest = std::min(smallest, element);
    }
    if (bytes != window.bytes) return "window's bytes are wrong";
    if (bytes > limits.bytes && bytes != smallest) return "window has too many bytes";
    total += bytes;
    next = window.end;
  }
  if (next != plan.copies.size()) return "copies outside all windows";
  return total == plan.bytes ? "" : "plan's bytes are wrong";
}

}  // namespace

std::pair<int64_t, int64_t> Chunk(int64_t size, int64_t count, int64_t i) {
  const int64_t chunk = (size + count - 1) / count;
  return {std::min(i * chunk, size), std::min((i + 1) * chunk, size)};
}

int MeshSize(const std::vector<int>& mesh) {
  return std::accumulate(mesh.begin(), mesh.end(), 1, std::multiplies<>());
}

Box ShardOf(const Shape& shape, const std::vector<int>& mesh,
            const std::vector<Placement>& placements, int rank) {
  std::vector<int> coordinates(mesh.size());
  for (size_t i = mesh.size(); i-- > 0;) {
    coordinates[i] = rank % mesh[i];
    rank /= mesh[i];
  }
  Box box = WholeBox(shape);
  for (const bool strided : {false, true}) {  // strided splits come after the plain ones
    for (size_t i = 0; i < mesh.size(); ++i) {
      const int dim = placements[i].dim;
      if (dim < 0 || placements[i].strided != strided) continue;
      const auto [begin, end] = Chunk(box.extent[dim], mesh[i], coordinates[i]);
      box.origin[dim] += begin;
      box.extent[dim] = end - begin;
    }
  }
  return box;
}

uint32_t Trainer::Add(std::string name, Shape shape, DType dtype,
                      const std::vector<std::vector<Box>>& boxes) {
  table_.push_back({std::move(name), shape, dtype});
  for (size_t rank = 0; rank < shards_.size(); ++rank) {
    RankShards& held = shards_[rank];
    for (const Box& box : boxes[rank]) {
      const auto found = std::find(held.boxes.begin(), held.boxes.end(), box);
      held.box_index.push_back(static_cast<uint32_t>(found - held.boxes.begin()));
      if (found == held.boxes.end()) held.boxes.push_back(box);
    }
    held.first.push_back(static_cast<uint32_t>(held.box_index.size()));
  }
  return static_cast<uint32_t>(table_.size() - 1);
}

uint32_t Trainer::Add(std::string name, Shape shape, const std::vector<int>& mesh,
                      const std::vector<Placement>& placements, DType dtype) {
  std::vector<std::vector<Box>> boxes(shards_.size());
  for (size_t rank = 0; rank < shards_.size(); ++rank) {
    boxes[rank].push_back(ShardOf(shape, mesh, placements, static_cast<int>(rank)));
  }
  return Add(std::move(name), shape, dtype, boxes);
}

Write StraightWrite(uint32_t tensor, uint32_t param, Box source, Box target) {
  Write write = {tensor, param, false, {}, source, target};
  for (int i = 0; i < target.num_dims(); ++i) {
    write.source_dim[static_cast<size_t>(i)] = static_cast<int8_t>(i);
  }
  return write;
}

Write ZeroFill(uint32_t param, Box target) { return {0, param, true, {}, Box(), target}; }

Box MakeBox(Dims origin, Dims extent) { return {origin, extent}; }

std::string FaultOf(const TensorTable& table, std::span<const RankShards> shards,
                    const RankLayout& layout, const RankPlan& plan, const WindowLimits& limits) {
  Memory memory = EmptyMemory(layout);
  for (size_t i = 0; i < plan.copies.size(); ++i) {
    const std::string fault = RunCopy(table, shards, layout, plan.copies[i], memory);
    if (!fault.empty()) return fmt::format("{}: copy {}", fault, i);
  }
  const Memory expected = Expected(table, layout);
  for (size_t p = 0; p < expected.size(); ++p) {
    for (size_t i = 0; i < expected[p].size(); ++i) {
      if (memory[p][i] == expected[p][i]) continue;
      return fmt::format("wrong element: {} offset {}: has {}, expected {}", layout.params[p].name,
                         i, memory[p][i], expected[p][i]);
    }
  }
  return WindowFault(layout, plan, limits);
}

std::vector<uint64_t> SentBytes(const TensorTable& table, size_t num_ranks,
                                const RankLayout& layout, const RankPlan& plan) {
  std::vector<uint64_t> sent(num_ranks, 0);
  for (const Copy& copy : plan.copies) {
    const Write& write = layout.writes[copy.write];
    if (write.zero_fill) continue;
    sent[copy.source_rank] +=
        static_cast<uint64_t>(copy.source.num_elements()) * SizeBytes(table[write.tensor].dtype);
  }
  return sent;
}

std::string ReasonOf(const Status& status) {
  return status.ok() ? std::string() : FieldsOf(status).reason;
}

}  // namespace weightd::testing
