// A trainer rank with a forked child that lives on: registers at the address in argv[1], forks,
// prints the child's pid and waits to be killed. The child reports what it can still do.
#include <unistd.h>

#include <cstdio>
#include <string_view>

#include "tests/unit/client/client_testing.h"

namespace {

bool Forked(weightd_error* error) {
  const weightd::testing::ErrorPtr owned(error);
  return weightd_error_code(error) == 9 &&
         std::string_view(weightd_error_field(error, "reason")) == "FORKED";
}

/// In the child every call must fail at once, also opening anew, and closing must not wait for
/// threads that only the parent has.
bool RefusedInChild(weightd_actor* actor, const weightd_actor_options& options,
                    const weightd_tensor& tensor) {
  const bool refused = Forked(weightd_actor_register(actor, &tensor, 1));
  weightd_actor_close(actor);
  weightd_actor* other = nullptr;
  return refused && Forked(weightd_actor_open(&options, &other));
}

}  // namespace

int main(int argc, char** argv) {
  using namespace weightd::testing;  // NOLINT(google-build-using-namespace): a test's main
  if (argc != 2) return 2;
  const weightd_actor_options options{
      .address = argv[1], .model = "m", .group = "g", .rank = 0, .world_size = 1};
  weightd_actor* actor = nullptr;
  if (weightd_actor_open(&options, &actor) != nullptr) return 3;
  const SharedFloats memory(8);
  const TensorOf a("a", {8}, 0, 8, memory.Memory());
  const weightd_tensor tensor = a.View();
  if (weightd_actor_register(actor, &tensor, 1) != nullptr) return 4;
  int pipe_fds[2];
  if (::pipe(pipe_fds) != 0) return 5;
  const pid_t child = ::fork();
  if (child == 0) {
    const char refused = RefusedInChild(actor, options, tensor) ? 'y' : 'n';
    if (::write(pipe_fds[1], &refused, 1) != 1) return 6;
    while (true) ::pause();
  }
  char refused = 0;
  if (::read(pipe_fds[0], &refused, 1) != 1) return 7;
  std::printf("%d %c\n", static_cast<int>(child), refused);
  std::fflush(stdout);
  while (true) ::pause();
}
