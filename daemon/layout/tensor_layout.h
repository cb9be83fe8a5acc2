// What both sides of a sync hold: the trainer's tensors and shards, an engine rank's parameters,
// and the blocks that lead from one to the other. Pure values, no addresses.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "daemon/layout/box.h"
#include "daemon/layout/dtype.h"

namespace weightd {

/// A tensor of the trainer as the whole group sees it.
struct TensorInfo {
  std::string name;
  Shape shape;
  DType dtype = DType::kUnspecified;
  bool operator==(const TensorInfo&) const = default;
};

/// The tensors of one trainer group. Everything else refers to them by position.
using TensorTable = std::vector<TensorInfo>;

/// What one actor rank holds: for tensor t the boxes box_index[first[t] .. first[t+1]) into
/// `boxes`, which lists distinct boxes once. A rank that holds nothing of t has an empty range
/// there. \invariant first.size() == table.size() + 1
struct RankShards {
  std::vector<Box> boxes;
  std::vector<uint32_t> first;
  std::vector<uint32_t> box_index;
};

/// How a parameter may be written; see weightd.v1.ParamKind.
enum class ParamKind : uint8_t { kUnspecified = 0, kRaw = 1, kDerived = 2, kOpaque = 3 };

/// A parameter of one engine rank.
struct ParamInfo {
  std::string name;
  Shape shape;  ///< local
  DType dtype = DType::kUnspecified;
  ParamKind kind = ParamKind::kRaw;
  std::string
      alias_of;  ///< not empty: shares the storage of that parameter and is not written by itself
  uint32_t stage = 0;  ///< 0: written in place; see daemon/layout/stages.h
  /// No worker can map the parameter itself: what is lent is memory of its client, which copies
  /// every stage into the parameter.
  bool pulled = false;
  uint64_t stage_rows = 0;  ///< not 0: that many rows come with `stage`, as many with the next ...
  bool operator==(const ParamInfo&) const = default;
};

/// Where a rank stands in its engine.
struct EngineCoordinates {
  int tp_rank = 0;
  int tp_size = 1;
  int pp_rank = 0;
  int pp_size = 1;
  int ep_rank = 0;
  int ep_size = 1;  ///< 1: experts are split by tp
  int dp_rank = 0;
  bool operator==(const EngineCoordinates&) const = default;
};

/// One axis-aligned block of a source tensor that lands, permuted and cast, in one block of one
/// parameter. Target dimension j follows source dimension source_dim[j], or none (-1, then its
/// extent is 1); source dimensions that no target dimension follows have extent 1. \invariant
/// target.extent[j] == (source_dim[j] < 0 ? 1 : source.extent[source_dim[j]])
struct Write {
  uint32_t tensor = 0;  ///< position in the TensorTable; meaningless when zero_fill
  uint32_t param = 0;   ///< position in RankLayout::params
  bool zero_fill = false;
  std::array<int8_t, kMaxDims> source_dim{};
  Box source;  ///< global coordinates of the source tensor
  Box target;  ///< coordinates of the parameter

  bool operator==(const Write&) const = default;
};

/// Everything one engine rank is to receive.
struct RankLayout {
  EngineCoordinates coordinates;
  std::vector<ParamInfo> params;
  std::vector<Write>
      writes;  ///< cover every element of every raw or derived parameter exactly once
};

}  // namespace weightd
