// Runs the GPU tests, or says why not and returns 77 (CTest's SKIP_RETURN_CODE).
#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#include <cstdio>

#include "daemon/device/cuda/device.h"

int main(int argc, char** argv) {
  constexpr int kSkipped = 77;
  if (const weightd::Status usable = weightd::cuda::CheckAvailable(); !usable.ok()) {
    std::printf("skipped: %s\n", weightd::Message(usable).c_str());
    return kSkipped;
  }
  return Catch::Session().run(argc, argv);
}
