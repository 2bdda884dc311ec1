// bank_update on the CPU. Each thread owns the rows whose number is its own modulo the number of
// threads and walks the whole index: no row has two writers, and duplicates are applied in order
// whatever the number of threads. The rows are bank_update_cpu_impl.cpp's.
#include <algorithm>
#include <atomic>

#include "bank_update.h"
#include "bank_update_cpu_impl.h"

namespace codir_fast {

Status bank_update_cpu(void* bank, bool* filled, const std::int64_t* index, const void* keys,
                       std::int64_t N, std::int64_t D, DType bank_dtype, double momentum,
                       const Executor& executor, Isa isa) {
  constexpr std::int64_t kWorthThreads = 1 << 17;  // elements; fewer are written before one starts
  const std::int64_t owners = N * D < kWorthThreads ? 1 : std::max(executor.num_threads, 1);
  const UpdateTask task{bank, filled, index, keys, N, D, owners, bank_dtype, momentum};
  const UpdateKernels& kernel = CODIR_FAST_KERNELS(kUpdateKernels, isa);
  std::atomic<bool> failed{false};
  executor.parallel_for(owners, [&](std::int64_t begin, std::int64_t end) {
    if (kernel.update_rows(task, begin, end) != Status::kOk) failed = true;
  });
  return failed ? Status::kUnsupportedDType : Status::kOk;
}

}  // namespace codir_fast
