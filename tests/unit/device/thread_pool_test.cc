#include "daemon/device/host/thread_pool.h"

#include <atomic>
#include <catch2/catch.hpp>
#include <thread>
#include <vector>

namespace weightd::host {

TEST_CASE("every index runs exactly once and its writes are seen") {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    CHECK(pool.num_threads() == threads);
    std::vector<int> counts(1000, 0);  // not atomic: each index has one writer
    for (int round = 0; round < 50; ++round) {
      pool.ParallelFor(counts.size(), [&](size_t i) { ++counts[i]; });
      for (const int count : counts) REQUIRE(count == round + 1);
    }
  }
}

TEST_CASE("loops of zero and one are fine") {
  ThreadPool pool(3);
  int runs = 0;
  pool.ParallelFor(0, [&](size_t) { ++runs; });
  pool.ParallelFor(1, [&](size_t) { ++runs; });
  CHECK(runs == 1);
}

TEST_CASE("loops work on several threads at a time") {
  ThreadPool pool(2);
  // Each of two calls waits for the other, so one thread alone would never finish.
  std::atomic<int> inside{0};
  pool.ParallelFor(2, [&](size_t) {
    inside.fetch_add(1);
    while (inside.load() < 2) std::this_thread::yield();
  });
  CHECK(inside.load() == 2);
}

TEST_CASE("short loops in a row do not mix") {
  ThreadPool pool(4);
  for (size_t round = 0; round < 2000; ++round) {
    std::atomic<size_t> sum{0};
    pool.ParallelFor(1 + round % 7, [&](size_t i) { sum.fetch_add(i + 1); });
    const size_t count = 1 + round % 7;
    REQUIRE(sum.load() == count * (count + 1) / 2);
  }
}

}  // namespace weightd::host
