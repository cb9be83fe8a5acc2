// The seed of property tests: new at every run, printed, and repeated with WEIGHTD_TEST_SEED.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <random>

namespace weightd {

inline uint64_t TestSeed() {
  static const uint64_t seed = [] {
    const char* text = std::getenv("WEIGHTD_TEST_SEED");
    const uint64_t value = text != nullptr ? std::strtoull(text, nullptr, 10)
                                           : static_cast<uint64_t>(std::random_device()());
    std::cout << "WEIGHTD_TEST_SEED=" << value << std::endl;
    return value;
  }();
  return seed;
}

}  // namespace weightd
