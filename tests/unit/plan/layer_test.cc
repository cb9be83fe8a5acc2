#include <catch2/catch.hpp>

#include "daemon/plan/transfer_plan.h"

namespace weightd {
namespace {

std::vector<std::string> Ordered(const std::vector<std::string>& names) {
  std::vector<ParamInfo> params;
  for (const std::string& name : names) params.push_back({name, {1}, DType::kFloat32});
  std::vector<std::string> ordered;
  for (uint32_t i : LayerOrder(params)) ordered.push_back(names[i]);
  return ordered;
}

TEST_CASE("the layer of a parameter is its outermost integer") {
  CHECK(LayerOf("model.layers.3.mlp.up_proj.weight") == LayerKey{"model.layers.", 3});
  CHECK(LayerOf("model.layers.3.experts.7.w1") == LayerKey{"model.layers.", 3});
  CHECK(LayerOf("0.weight") == LayerKey{"", 0});
  CHECK(LayerOf("layers.12") == LayerKey{"layers.", 12});
  CHECK(LayerOf("model.norm.weight") == LayerKey{"model.norm.weight", -1});
  CHECK(LayerOf("h2.w13_weight") == LayerKey{"h2.w13_weight", -1});
  CHECK(LayerOf("a..b.") == LayerKey{"a..b.", -1});
  CHECK(LayerOf("") == LayerKey{"", -1});
  CHECK(LayerOf("x.99999999999999999999.y").index == -1);
}

TEST_CASE("layers follow each other by number, the rest keeps its place") {
  CHECK(
      Ordered({"embed", "layers.10.a", "layers.2.a", "layers.2.b", "norm", "head"}) ==
      std::vector<std::string>{"embed", "layers.2.a", "layers.2.b", "layers.10.a", "norm", "head"});
}

TEST_CASE("scattered parameters of one layer come together") {
  CHECK(Ordered({"layers.0.a", "norm", "vision.0.a", "layers.1.a", "layers.0.b"}) ==
        std::vector<std::string>{"layers.0.a", "layers.0.b", "layers.1.a", "norm", "vision.0.a"});
}

}  // namespace
}  // namespace weightd
