// One query against rows named by index, for one instruction set (CODIR_FAST_ISA_NAMESPACE).
// Rows lie anywhere in the bank, so memory latency rules: rows further on are fetched while those
// at hand are used. A chunk of rows gives its logits, follows the maximum, and is then added to O
// from cache. Never materialised: anything of size M x D.
#include "indexed_contrast_cpu_impl.h"

#include <limits>

#include "simd/vec.h"
#include "storage.h"

namespace codir_fast {
namespace CODIR_FAST_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kChunk = 64;  // rows, a multiple of all vector widths
constexpr std::int64_t kAhead = 16;  // rows between the one fetched and the one used
constexpr int kColumns = 4;          // vectors of O that are summed in registers

template <typename C>
constexpr C kInfinity = std::numeric_limits<C>::infinity();

template <typename C>
std::int64_t scratch_size(std::int64_t D) {
  return kChunk * D;  // a chunk of rows, where the bank is of another type than C
}

// The rows of a chunk that count, as C, and what they count.
template <typename C>
struct Chunk {
  const C* rows[kChunk];
  C scale[kChunk];
  C logits[kChunk];
  std::int64_t position[kChunk];  // in the query's list
  std::int64_t size;
};

bool counts(const BankContrastInputs& in, std::int64_t i, std::int64_t j) {
  return (in.valid == nullptr || in.valid[j]) &&
         (in.labels == nullptr || in.labels[i] != in.bank_labels[j]) &&
         (in.exclude_index == nullptr || in.exclude_index[i] != j);
}

template <typename T>
void fetch(const T* row, std::int64_t D) {
  for (std::int64_t d = 0; d < D; d += 64 / static_cast<std::int64_t>(sizeof(T))) {
    __builtin_prefetch(row + d, 0, 3);
  }
}

template <typename C>
void load_chunk(Chunk<C>& chunk, const IndexedContrastInputs& inputs, std::int64_t i,
                std::int64_t begin, std::int64_t end, C* scratch) {
  const BankContrastInputs& in = inputs.bank;
  const std::int64_t* index = inputs.index + i * inputs.M;
  chunk.size = 0;
  with_storage(in.bank_dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* bank = static_cast<const T*>(in.bank);
    for (std::int64_t m = begin; m < end && m < begin + kChunk; ++m) {
      const std::int64_t j = index[m];
      if (!counts(in, i, j)) continue;
      const std::int64_t n = chunk.size++;
      chunk.position[n] = m;
      chunk.scale[n] = in.bank_scale != nullptr ? static_cast<const C*>(in.bank_scale)[j] : C{1};
      if constexpr (std::is_same_v<T, C>) {
        chunk.rows[n] = bank + j * in.D;
      } else {
        if (m + kAhead < end) fetch(bank + index[m + kAhead] * in.D, in.D);
        convert(scratch + n * in.D, bank + j * in.D, in.D);
        chunk.rows[n] = scratch + n * in.D;
      }
    }
  });
}

template <typename C>
C sum_lanes(Vec<C> value) {
  C part[kLanes<C>];
  store(part, value);
#pragma GCC unroll 8
  for (int half = kLanes<C> / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
  }
  return part[0];
}

template <typename C>
C dot(const C* a, const C* b, std::int64_t D) {
  using V = Vec<C>;
  V even{}, odd{};
  std::int64_t d = 0;
  for (; d + 2 * kLanes<C> <= D; d += 2 * kLanes<C>) {
    even += load<V>(a + d) * load<V>(b + d);
    odd += load<V>(a + d + kLanes<C>) * load<V>(b + d + kLanes<C>);
  }
  C sum = sum_lanes<C>(even + odd);
  for (; d < D; ++d) sum += a[d] * b[d];
  return sum;
}

// Logits of the chunk; the rows of the chunk's successor are fetched meanwhile.
template <typename C>
void chunk_logits(Chunk<C>& chunk, const IndexedContrastInputs& inputs, std::int64_t i,
                  std::int64_t end) {
  const BankContrastInputs& in = inputs.bank;
  const C* query = static_cast<const C*>(in.query) + i * in.D;
  const C* bank = static_cast<const C*>(in.bank);
  const bool in_place = in.bank_dtype == in.dtype;
  for (std::int64_t n = 0; n < chunk.size; ++n) {
    const std::int64_t ahead = chunk.position[n] + kAhead;
    if (in_place && ahead < end) fetch(bank + inputs.index[i * inputs.M + ahead] * in.D, in.D);
    chunk.logits[n] =
        dot(query, chunk.rows[n], in.D) * (static_cast<C>(in.inv_temperature) * chunk.scale[n]);
  }
  for (std::int64_t n = chunk.size; n < kChunk; ++n) chunk.logits[n] = -kInfinity<C>;
}

// logits <- e^(logits - shift), 0 past the chunk's size.
template <typename C>
void exponentiate(Chunk<C>& chunk, C shift) {
  for (std::int64_t n = 0; n < kChunk; n += kLanes<C>) {
    store(chunk.logits + n, exp(load<Vec<C>>(chunk.logits + n) - splat(shift)));
  }
}

// sums += weights x rows.
template <typename C>
void add_rows(C* sums, const Chunk<C>& chunk, const C* weights, std::int64_t D) {
  using V = Vec<C>;
  constexpr std::int64_t step = kColumns * kLanes<C>;
  std::int64_t d = 0;
  for (; d + step <= D; d += step) {
    V sum[kColumns] = {};
    for (std::int64_t n = 0; n < chunk.size; ++n) {
#pragma GCC unroll 4
      for (int v = 0; v < kColumns; ++v) {
        sum[v] += load<V>(chunk.rows[n] + d + v * kLanes<C>) * weights[n];
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kColumns; ++v) {
      C* to = sums + d + v * kLanes<C>;
      store(to, load<V>(to) + sum[v]);
    }
  }
  for (; d < D; ++d) {
    C sum = 0;
    for (std::int64_t n = 0; n < chunk.size; ++n) sum += chunk.rows[n][d] * weights[n];
    sums[d] += sum;
  }
}

template <typename C>
void scan(const IndexedSums<C>& out, const IndexedContrastInputs& inputs, std::int64_t i,
          std::int64_t begin, std::int64_t end, C* scratch) {
  const std::int64_t D = inputs.bank.D;
  *out.shift = -kInfinity<C>;
  *out.total = 0;
  for (std::int64_t d = 0; d < D; ++d) out.weighted_rows[d] = 0;
  Chunk<C> chunk;
  for (; begin < end; begin += kChunk) {
    load_chunk(chunk, inputs, i, begin, end, scratch);
    if (chunk.size == 0) continue;
    chunk_logits(chunk, inputs, i, end);
    C maximum = -kInfinity<C>;
    for (std::int64_t n = 0; n < chunk.size; ++n) {
      maximum = chunk.logits[n] > maximum ? chunk.logits[n] : maximum;
    }
    if (maximum > *out.shift) {
      const C factor = exp(splat(*out.shift - maximum))[0];
      *out.shift = maximum;
      *out.total *= static_cast<double>(factor);
      for (std::int64_t d = 0; d < D; ++d) out.weighted_rows[d] *= factor;
    }
    exponentiate(chunk, *out.shift == -kInfinity<C> ? C{0} : *out.shift);
    C weights[kChunk], sum = 0;
    for (std::int64_t n = 0; n < chunk.size; ++n) {
      sum += chunk.logits[n];
      weights[n] = chunk.logits[n] * chunk.scale[n];
    }
    *out.total += static_cast<double>(sum);
    add_rows(out.weighted_rows, chunk, weights, D);
  }
}

template <typename C>
void coefficients(C* coefficient, const IndexedContrastInputs& inputs, std::int64_t i, C grad,
                  C lse, C* scratch) {
  const C share = grad * static_cast<C>(inputs.bank.inv_temperature);
  Chunk<C> chunk;
  for (std::int64_t m = 0; m < inputs.M; ++m) coefficient[m] = 0;
  for (std::int64_t begin = 0; begin < inputs.M; begin += kChunk) {
    load_chunk(chunk, inputs, i, begin, inputs.M, scratch);
    if (chunk.size == 0) continue;
    chunk_logits(chunk, inputs, i, inputs.M);
    exponentiate(chunk, lse);
    for (std::int64_t n = 0; n < chunk.size; ++n) {
      coefficient[chunk.position[n]] = chunk.logits[n] * share * chunk.scale[n];
    }
  }
}

}  // namespace

extern const IndexedKernels<float> kIndexedKernelsFloat = {scratch_size<float>, scan<float>,
                                                           coefficients<float>};
extern const IndexedKernels<double> kIndexedKernelsDouble = {scratch_size<double>, scan<double>,
                                                             coefficients<double>};

}  // namespace CODIR_FAST_ISA_NAMESPACE
}  // namespace codir_fast
