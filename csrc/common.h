// What every kernel of codir_fast shares: element types, status, and how work is spread over
// threads. Kernels see raw pointers, sizes and an Executor; who owns the thread pool (torch, or a
// test) is the caller's business.
#pragma once

#include <cstdint>
#include <functional>

namespace codir_fast {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Kernels never print, exit or throw: they return one of these, and the binding words the error.
enum class Status { kOk, kUnsupportedDType, kOutOfMemory };

// Runs body(begin, end) on disjoint ranges that cover [0, size). Blocks until all have ended.
using ParallelFor = std::function<void(
    std::int64_t size, const std::function<void(std::int64_t, std::int64_t)>& body)>;

struct Executor {
  int num_threads = 1;
  ParallelFor parallel_for = [](std::int64_t size, const auto& body) {
    if (size > 0) body(0, size);
  };
};

}  // namespace codir_fast
