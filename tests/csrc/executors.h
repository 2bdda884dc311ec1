// Executors that the tests run kernels on: the calling thread, or a few threads with contiguous
// ranges as torch's pool.
#pragma once

#include <algorithm>
#include <thread>
#include <vector>

#include "common.h"

namespace codir_fast {

inline Executor threads(int count) {
  return {count, [count](std::int64_t size, const auto& body) {
            const std::int64_t share = (size + count - 1) / count;
            std::vector<std::thread> pool;
            for (std::int64_t begin = 0; begin < size; begin += share) {
              pool.emplace_back(
                  [&body, begin, end = std::min(begin + share, size)] { body(begin, end); });
            }
            for (std::thread& thread : pool) thread.join();
          }};
}

}  // namespace codir_fast
