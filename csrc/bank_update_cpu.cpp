// bank_update on the CPU. Each thread owns the rows whose number is its own modulo the number of
// threads and walks the whole index: no row has two writers, and duplicates are applied in order
// whatever the number of threads.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "bank_update.h"
#include "storage.h"

namespace codir_fast {
namespace {

// Norms below this count as this, as in torch.nn.functional.normalize.
constexpr double kMinNorm = 1e-12;

template <typename T, typename C>
void update_row(T* row, const C* key, std::int64_t D, C momentum) {
  const auto blend = [&](std::int64_t d) {
    // 0 * row would let an infinity or NaN of a row that was never filled through.
    return momentum == 0 ? key[d] : momentum * to_compute(row[d]) + (1 - momentum) * key[d];
  };
  double square = 0;
  for (std::int64_t d = 0; d < D; ++d)
    square += static_cast<double>(blend(d)) * static_cast<double>(blend(d));
  const C norm = static_cast<C>(std::max(std::sqrt(square), kMinNorm));
  for (std::int64_t d = 0; d < D; ++d) from_compute(blend(d) / norm, &row[d]);
}

}  // namespace

Status bank_update_cpu(void* bank, bool* filled, const std::int64_t* index, const void* keys,
                       std::int64_t N, std::int64_t D, DType bank_dtype, double momentum,
                       const Executor& executor) {
  constexpr std::int64_t kWorthThreads = 1 << 15;  // elements; fewer are written before one starts
  const std::int64_t owners = N * D < kWorthThreads ? 1 : std::max(executor.num_threads, 1);
  return with_storage(bank_dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using C = Compute<T>;
    executor.parallel_for(owners, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t n = 0; n < N; ++n) {
        const std::int64_t row = index[n], owner = row % owners;
        if (owner < begin || owner >= end) continue;
        const bool keeps = filled == nullptr || filled[row];
        update_row(static_cast<T*>(bank) + row * D, static_cast<const C*>(keys) + n * D, D,
                   keeps ? static_cast<C>(momentum) : C{0});
        if (filled != nullptr) filled[row] = true;
      }
    });
  });
}

}  // namespace codir_fast
