// Memory and errors of the C ABI for tests.
#pragma once

#include <sys/mman.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "client/include/weightd/weightd.h"
#include "daemon/base/scoped_fd.h"

namespace weightd::testing {

/// A shared memory object of `count` floats 0, 1, 2, ...
struct SharedFloats {
  explicit SharedFloats(size_t count);
  ~SharedFloats();
  weightd_memory Memory(size_t offset_elements = 0, std::vector<int64_t> strides = {1}) const;

  ScopedFd fd;
  size_t size_bytes = 0;
  float* data = nullptr;
};

struct ErrorDeleter {
  void operator()(weightd_error* error) const { weightd_error_free(error); }
};
using ErrorPtr = std::unique_ptr<weightd_error, ErrorDeleter>;

inline std::string Field(const ErrorPtr& error, const char* field) {
  return weightd_error_field(error.get(), field);
}

/// Reads and frees a JSON string of the ABI.
nlohmann::json TakeJson(char* text);

/// A tensor whose first dimension this rank holds from `begin` on, `rows` of `shape[0]`.
struct TensorOf {
  TensorOf(std::string name, std::vector<int64_t> shape, int64_t begin, int64_t rows,
           weightd_memory memory);
  weightd_tensor View() const;

  std::string name;
  std::vector<int64_t> shape;
  weightd_shard shard{};
};

/// An open actor or engine, closed at the end of the scope.
struct ActorCloser {
  void operator()(weightd_actor* actor) const { weightd_actor_close(actor); }
};
using ActorPtr = std::unique_ptr<weightd_actor, ActorCloser>;
struct EngineCloser {
  void operator()(weightd_engine* engine) const { weightd_engine_close(engine); }
};
using EnginePtr = std::unique_ptr<weightd_engine, EngineCloser>;

}  // namespace weightd::testing
