// A small trainer and an engine rank in plain memory, with a plan cut by hand, for transport tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "daemon/device/host/float_bits.h"
#include "daemon/layout/box.h"
#include "daemon/layout/digest.h"
#include "daemon/layout/tensor_layout.h"
#include "daemon/plan/transfer_plan.h"
#include "daemon/transport/transport.h"

namespace weightd::testing {

/// float32 tensors, each split along dimension 0 over `ranks` actor ranks, and one bfloat16 engine
/// rank. Add tensors and parameters, then Finish(), then use plan().
class PlanFixture {
 public:
  explicit PlanFixture(uint32_t ranks) : ranks_(ranks) {}

  uint32_t AddTensor(const std::string& name, const Shape& shape) {
    table_.push_back({name, shape, DType::kFloat32});
    return static_cast<uint32_t>(table_.size() - 1);
  }

  uint32_t AddParam(const std::string& name, const Shape& shape, ParamKind kind = ParamKind::kRaw,
                    const std::string& alias_of = "") {
    layout_.params.push_back({name, shape, DType::kBFloat16, kind, alias_of});
    return static_cast<uint32_t>(layout_.params.size() - 1);
  }

  /// `source_dim[j]` as in Write.
  void AddWrite(uint32_t tensor, const Box& source, uint32_t param, const Dims& target_origin,
                const std::vector<int>& source_dim) {
    Write write;
    write.tensor = tensor;
    write.param = param;
    write.source = source;
    write.target.origin = target_origin;
    write.source_dim.fill(-1);
    for (size_t j = 0; j < source_dim.size(); ++j) {
      write.source_dim[j] = static_cast<int8_t>(source_dim[j]);
      write.target.extent.push_back(source_dim[j] < 0 ? 1 : source.extent[source_dim[j]]);
    }
    layout_.writes.push_back(write);
  }

  void AddZeroFill(uint32_t param, const Box& target) {
    Write write;
    write.param = param;
    write.zero_fill = true;
    write.target = target;
    layout_.writes.push_back(write);
  }

  /// Allocates, fills the sources and cuts the plan into windows of `copies_per_window`.
  void Finish(uint32_t copies_per_window) {
    shards_.resize(ranks_);
    memory_.resize(ranks_);
    bound_.sources.resize(ranks_);
    for (uint32_t r = 0; r < ranks_; ++r) FillRank(r);
    for (const ParamInfo& param : layout_.params) {
      params_.emplace_back(static_cast<size_t>(NumElements(param.shape)), uint16_t{0x5a5a});
    }
    for (uint32_t w = 0; w < layout_.writes.size(); ++w) CutWrite(w);
    const auto count = static_cast<uint32_t>(plan_.copies.size());
    for (uint32_t begin = 0; begin < count; begin += copies_per_window) {
      const uint32_t end = std::min(count, begin + copies_per_window);
      uint64_t bytes = 0;
      for (uint32_t i = begin; i < end; ++i) {
        bytes += 2 * static_cast<uint64_t>(plan_.copies[i].target.num_elements());
      }
      plan_.windows.push_back({begin, end, bytes});
      plan_.bytes += bytes;
    }
    Bind();
  }

  /// Value of an element of a tensor: its float32 bits depend on everything.
  static uint32_t Bits(uint32_t tensor, int64_t index) {
    const uint64_t mixed = Mix64(uint64_t{tensor} << 40 ^ static_cast<uint64_t>(index));
    return 0x3c000000U + (static_cast<uint32_t>(mixed) & 0x83ffffffU);
  }

  /// What every parameter must hold, by brute force; 0x5a5a where nothing is written.
  std::vector<std::vector<uint16_t>> Expected() const {
    std::vector<std::vector<uint16_t>> all;
    for (const ParamInfo& param : layout_.params) {
      all.emplace_back(static_cast<size_t>(NumElements(param.shape)), uint16_t{0x5a5a});
    }
    for (const Write& write : layout_.writes) ExpectWrite(write, all[write.param]);
    return all;
  }

  BoundPlan& plan() { return bound_; }
  RankPlan& rank_plan() { return plan_; }
  const RankLayout& layout() const { return layout_; }
  std::vector<std::vector<uint16_t>>& params() { return params_; }
  std::vector<uint32_t>& shard_memory(uint32_t rank, uint32_t tensor) {
    return memory_[rank][tensor];
  }
  uint32_t num_ranks() const { return ranks_; }

  /// Marks one shard as staged: the transport no longer sees its memory.
  void Stage(uint32_t rank, uint32_t tensor) {
    bound_.sources[rank][tensor].staged = true;
    bound_.sources[rank][tensor].base = nullptr;
  }
  const Box& Held(uint32_t rank, uint32_t tensor) const { return shards_[rank].boxes[tensor]; }

 private:
  void FillRank(uint32_t rank) {
    shards_[rank].first.push_back(0);
    for (uint32_t t = 0; t < table_.size(); ++t) {
      Box held = WholeBox(table_[t].shape);
      const int64_t rows = table_[t].shape[0];
      held.origin[0] = rows * rank / ranks_;
      held.extent[0] = rows * (rank + 1) / ranks_ - held.origin[0];
      shards_[rank].boxes.push_back(held);
      shards_[rank].box_index.push_back(t);
      shards_[rank].first.push_back(t + 1);
      const int64_t first = held.origin[0] * (NumElements(table_[t].shape) / rows);
      std::vector<uint32_t> values(static_cast<size_t>(held.num_elements()));
      for (size_t i = 0; i < values.size(); ++i) {
        values[i] = Bits(t, first + static_cast<int64_t>(i));
      }
      memory_[rank].push_back(std::move(values));
    }
  }

  void CutWrite(uint32_t w) {
    const Write& write = layout_.writes[w];
    Copy copy;
    copy.write = w;
    copy.target = write.target;
    if (write.zero_fill) {
      plan_.copies.push_back(copy);
      return;
    }
    for (uint32_t r = 0; r < ranks_; ++r) {
      copy.source_rank = r;
      copy.source = Intersect(write.source, shards_[r].boxes[write.tensor]);
      if (copy.source.empty()) continue;
      for (int j = 0; j < write.target.num_dims(); ++j) {
        const int d = write.source_dim[static_cast<size_t>(j)];
        if (d < 0) continue;
        copy.target.origin[j] =
            write.target.origin[j] + copy.source.origin[d] - write.source.origin[d];
        copy.target.extent[j] = copy.source.extent[d];
      }
      plan_.copies.push_back(copy);
    }
  }

  void Bind() {
    bound_.table = &table_;
    bound_.shards = shards_;
    for (uint32_t r = 0; r < ranks_; ++r) {
      for (uint32_t t = 0; t < table_.size(); ++t) {
        bound_.sources[r].push_back({reinterpret_cast<std::byte*>(memory_[r][t].data()),
                                     RowMajorStrides(shards_[r].boxes[t].extent), false});
      }
    }
    BoundTarget target;
    target.layout = &layout_;
    target.plan = &plan_;
    target.label = "engine e0 tp 0";
    for (size_t p = 0; p < params_.size(); ++p) {
      const ParamInfo& param = layout_.params[p];
      const bool ours = param.kind != ParamKind::kOpaque && param.alias_of.empty();
      target.params.push_back({ours ? reinterpret_cast<std::byte*>(params_[p].data()) : nullptr,
                               RowMajorStrides(param.shape), false});
    }
    bound_.targets.push_back(std::move(target));
  }

  void ExpectWrite(const Write& write, std::vector<uint16_t>& values) const {
    const Shape& param = layout_.params[write.param].shape;
    const Dims strides = RowMajorStrides(param);
    Dims index = Dims::Filled(write.target.num_dims(), 0);
    for (int64_t n = 0; n < write.target.num_elements(); ++n) {
      int64_t rest = n, at = 0;
      for (int j = index.size() - 1; j >= 0; --j) {
        index[j] = rest % write.target.extent[j];
        rest /= write.target.extent[j];
        at += (write.target.origin[j] + index[j]) * strides[j];
      }
      uint16_t bits = 0;
      if (!write.zero_fill) {
        const Shape& shape = table_[write.tensor].shape;
        Dims source = write.source.origin;
        for (int j = 0; j < index.size(); ++j) {
          const int d = write.source_dim[static_cast<size_t>(j)];
          if (d >= 0) source[d] += index[j];
        }
        int64_t from = 0;
        for (int d = 0; d < shape.size(); ++d) from = from * shape[d] + source[d];
        bits = host::BFloat16FromFloat32(Bits(write.tensor, from));
      }
      values[static_cast<size_t>(at)] = bits;
    }
  }

  uint32_t ranks_;
  TensorTable table_;
  RankLayout layout_;
  std::vector<RankShards> shards_;
  std::vector<std::vector<std::vector<uint32_t>>> memory_;  // [rank][tensor], float32 bits
  std::vector<std::vector<uint16_t>> params_;               // bfloat16 bits
  RankPlan plan_;
  BoundPlan bound_;
};

}  // namespace weightd::testing
