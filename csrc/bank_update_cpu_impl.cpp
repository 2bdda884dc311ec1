// Rows of a bank moved to new keys, for one instruction set (CODIR_FAST_ISA_NAMESPACE). Loops are
// plain, for the compiler to vectorise.
#include "bank_update_cpu_impl.h"

#include <cmath>
#include <type_traits>

#include "storage.h"
#include "unit_rows.h"

namespace codir_fast {
namespace CODIR_FAST_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kAhead = 4;  // rows that are fetched before their turn

// bank row and key, mixed; a row that is not kept may hold anything: 0 * NaN would let it through.
template <bool kKeeps, typename T, typename C>
C blend(const T& element, C key, C momentum) {
  return kKeeps ? momentum * to_compute(element) + (1 - momentum) * key : key;
}

template <bool kKeeps, typename T, typename C>
void update_row(T* __restrict row, const C* __restrict key, std::int64_t D, C momentum) {
  constexpr std::int64_t kSums = 16;  // one sum would wait for itself
  double squares[kSums] = {};
  std::int64_t d = 0;
  for (; d + kSums <= D; d += kSums) {
    for (std::int64_t k = 0; k < kSums; ++k) {
      const double value = blend<kKeeps>(row[d + k], key[d + k], momentum);
      squares[k] += value * value;
    }
  }
  double square = 0;
  for (; d < D; ++d) {
    const double value = blend<kKeeps>(row[d], key[d], momentum);
    square += value * value;
  }
  for (std::int64_t k = 0; k < kSums; ++k) square += squares[k];
  const C norm = static_cast<C>(std::fmax(std::sqrt(square), kMinNorm));
  for (std::int64_t n = 0; n < D; ++n)
    from_compute(blend<kKeeps>(row[n], key[n], momentum) / norm, &row[n]);
}

template <typename T>
void update_rows_of(const UpdateTask& task, std::int64_t begin, std::int64_t end) {
  using C = Compute<T>;
  const C momentum = static_cast<C>(task.momentum);
  T* bank = static_cast<T*>(task.bank);
  const C* keys = static_cast<const C*>(task.keys);
  for (std::int64_t n = 0; n < task.N; ++n) {
    if (n + kAhead < task.N) __builtin_prefetch(bank + task.index[n + kAhead] * task.D, 1);
    const std::int64_t row = task.index[n], owner = row % task.owners;
    if (owner < begin || owner >= end) continue;
    const bool keeps = momentum != 0 && (task.filled == nullptr || task.filled[row]);
    const auto update = keeps ? update_row<true, T, C> : update_row<false, T, C>;
    update(bank + row * task.D, keys + n * task.D, task.D, momentum);
    if (task.filled != nullptr) task.filled[row] = true;
  }
}

Status update_rows(const UpdateTask& task, std::int64_t begin, std::int64_t end) {
  return with_storage(task.bank_dtype, [&](auto* tag) {
    update_rows_of<std::remove_pointer_t<decltype(tag)>>(task, begin, end);
  });
}

}  // namespace

extern const UpdateKernels kUpdateKernels{update_rows};

}  // namespace CODIR_FAST_ISA_NAMESPACE
}  // namespace codir_fast
