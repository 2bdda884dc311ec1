// The pass over the bank on the CPU, for one instruction set (CODIR_FAST_ISA_NAMESPACE).
// The bank is cut into blocks of rows that stay in cache; per block and tile of queries: S^T =
// block x queries as it lies (broadcast bank elements x query vectors), masks, weights P^T of the
// objective (e^(S^T - shift) for InfoNCE), then O^T += block^T x P^T. Never materialised: logits
// beyond one block x tile. Sums are hierarchical (block, run of blocks, total), so that neither l
// nor O stagnates on a bank whose rows are alike; so are those of the bank's gradient over tiles.
#include "bank_contrast_cpu_impl.h"

#include <limits>

#include "objective.h"
#include "simd/vec.h"
#include "storage.h"

namespace codir_fast {
namespace CODIR_FAST_ISA_NAMESPACE {
namespace {

// Register tiles, rows x vectors, that leave room for the operands: of 32 registers with AVX-512,
// of 16 elsewhere.
#if defined(__AVX512F__)
constexpr int kMaxTileVectors = 4;
constexpr int tile_rows(int NV) { return NV == 4 ? 6 : 14; }
#else
constexpr int kMaxTileVectors = 2;
constexpr int tile_rows(int NV) { return NV == 2 ? 6 : 12; }
#endif
constexpr int kMaxTileRows = 14;

constexpr std::int64_t kMaxBlockRows = 126, kMinBlockRows = 42;  // multiples of 6 and 14
constexpr std::int64_t kBlockElements = 1 << 15;                 // of a block, within those bounds
constexpr std::int64_t kDepth = 128;  // a query's elements that stay in L1 meanwhile
constexpr std::int64_t kBlocksPerRun = 64, kQueriesPerRun = 512;
constexpr std::int64_t kMaxLanes = kMaxTileVectors * kVectorBytes / 4;
// Weights may grow to e^kSlack before the shift follows the maximum, so that O is seldom rescaled.
constexpr int kSlack = 8;

template <typename C>
constexpr C kInfinity = std::numeric_limits<C>::infinity();

std::int64_t block_rows(std::int64_t D) {
  const std::int64_t rows = kBlockElements / D / kMinBlockRows * kMinBlockRows;
  return rows < kMinBlockRows ? kMinBlockRows : rows > kMaxBlockRows ? kMaxBlockRows : rows;
}

template <typename C>
std::int64_t padded_dim(std::int64_t D) {
  return (D + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
}

// out[r] (+)= sum over depth of rows[r][depth] * right[depth], MR rows of NV vectors. `ahead`, if
// not null, is memory wanted soon: it is fetched into L2 a line per step, step_ahead bytes apart.
template <int MR, int NV, typename C>
void row_product(C* out, std::int64_t ldo, const C* const* rows, const C* right, std::int64_t ldr,
                 std::int64_t depth_begin, std::int64_t depth_end, bool accumulate,
                 const char* ahead, std::int64_t step_ahead) {
  using V = Vec<C>;
  const C* row[MR];
  V sum[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
    row[r] = rows[r];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      sum[r][v] = accumulate ? load<V>(out + r * ldo + v * kLanes<C>) : V{};
  }
  for (std::int64_t depth = depth_begin; depth < depth_end; ++depth) {
    V b[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) b[v] = load<V>(right + depth * ldr + v * kLanes<C>);
    if (ahead != nullptr) __builtin_prefetch(ahead + depth * step_ahead, 0, 2);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[r][v] += row[r][depth] * b[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(out + r * ldo + v * kLanes<C>, sum[r][v]);
  }
}

// out[c] += sum over k of rows[k][c] * right[k], MR columns c of NV vectors.
template <int MR, int NV, typename C>
void column_product(C* out, std::int64_t ldo, const C* const* rows, std::int64_t column,
                    std::int64_t num_rows, const C* right, std::int64_t ldr) {
  using V = Vec<C>;
  V sum[MR][NV];
#pragma GCC unroll 16
  for (int c = 0; c < MR; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[c][v] = V{};
  }
  for (std::int64_t k = 0; k < num_rows; ++k) {
    const C* row = rows[k] + column;
    V b[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) b[v] = load<V>(right + k * ldr + v * kLanes<C>);
#pragma GCC unroll 16
    for (int c = 0; c < MR; ++c) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[c][v] += row[c] * b[v];
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < MR; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      C* to = out + c * ldo + v * kLanes<C>;
      store(to, load<V>(to) + sum[c][v]);
    }
  }
}

// A block of bank rows as the products want it: pointers, past the last row and at invalid rows to
// a row of zeros.
template <typename C>
struct Block {
  const C* rows[kMaxBlockRows + kMaxTileRows];
  std::int64_t begin, size;
  const char* next;  // the block after this one in the bank, null at the end
  std::int64_t bytes_per_element;
};

// Scratch space of one task, as scratch_size counts it.
template <typename C>
struct Scratch {
  C* logits;     // (kMaxBlockRows + kMaxTileRows, lanes)
  C* zero_row;   // (D,)
  C* converted;  // (kMaxBlockRows, D)
  C* sums;       // forward: [tile][d][lane] of the run of blocks; backward: gradient of the block
                 // from the run of tiles, padded_dim columns, then that from all runs

  Scratch(C* memory, std::int64_t lanes, std::int64_t D)
      : logits(memory),
        zero_row(logits + (kMaxBlockRows + kMaxTileRows) * lanes),
        converted(zero_row + padded_dim<C>(D)),
        sums(converted + kMaxBlockRows * padded_dim<C>(D)) {}
};

template <typename C>
std::int64_t scratch_size(std::int64_t lanes, std::int64_t D, std::int64_t num_tiles) {
  const std::int64_t forward = num_tiles * D * lanes,
                     backward = 2 * (kMaxBlockRows + kMaxTileRows) * padded_dim<C>(D);
  return (kMaxBlockRows + kMaxTileRows) * lanes + (kMaxBlockRows + 1) * padded_dim<C>(D) +
         (forward > backward ? forward : backward);
}

template <typename C>
void load_block(Block<C>& block, const Scratch<C>& scratch, const BankTask<C>& task,
                std::int64_t begin) {
  const BankContrastInputs& in = *task.inputs;
  const std::int64_t most = block_rows(in.D), left = task.row_end - begin;
  block.begin = begin;
  block.size = left < most ? left : most;
  with_storage(in.bank_dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* bank = static_cast<const T*>(in.bank) + begin * in.D;
    block.next = left > most ? reinterpret_cast<const char*>(bank + most * in.D) : nullptr;
    block.bytes_per_element = sizeof(T);
    for (std::int64_t k = 0; k < block.size; ++k) {
      const T* row = bank + k * in.D;
      if (in.valid != nullptr && !in.valid[begin + k]) {
        block.rows[k] = scratch.zero_row;
      } else if constexpr (std::is_same_v<T, C>) {
        block.rows[k] = row;
      } else {
        C* converted = scratch.converted + k * in.D;
        convert(converted, row, in.D);
        block.rows[k] = converted;
      }
    }
  });
  for (std::int64_t k = block.size; k < block.size + kMaxTileRows; ++k)
    block.rows[k] = scratch.zero_row;
}

template <int NV, typename C>
void mask_same_label(C* logits, const BankContrastInputs& in, std::int64_t query_begin,
                     const Block<C>& block) {
  // Labels as two halves: vectors of the width of C compare all 64 bits.
  using Int = typename Simd<C>::Int;
  using IV = IntVec<C>;
  Int low[kMaxLanes] = {}, high[kMaxLanes] = {};
  for (std::int64_t lane = 0; lane < NV * kLanes<C> && query_begin + lane < in.B; ++lane) {
    low[lane] = static_cast<Int>(in.labels[query_begin + lane]);
    high[lane] = static_cast<Int>(in.labels[query_begin + lane] >> 32);
  }
  for (std::int64_t k = 0; k < block.size; ++k) {
    const std::int64_t label = in.bank_labels[block.begin + k];
    const IV row_low = static_cast<Int>(label) - IV{},
             row_high = static_cast<Int>(label >> 32) - IV{};
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      C* at = logits + (k * NV + v) * kLanes<C>;
      const auto same =
          (load<IV>(low + v * kLanes<C>) == row_low) & (load<IV>(high + v * kLanes<C>) == row_high);
      store(at, same ? splat(-kInfinity<C>) : load<Vec<C>>(at));
    }
  }
}

// S^T of the block with one tile of queries, -inf where a row is no negative of a query;
// (block.size, NV vectors).
template <int NV, typename C>
void block_logits(C* logits, const BankTask<C>& task, std::int64_t tile, const Block<C>& block,
                  bool fetch_next) {
  constexpr int MR = tile_rows(NV);
  constexpr std::int64_t lanes = NV * kLanes<C>;
  const BankContrastInputs& in = *task.inputs;
  const C* query = task.packed_query + tile * in.D * lanes;
  for (std::int64_t depth = 0; depth < in.D; depth += kDepth) {
    const std::int64_t depth_end = depth + kDepth < in.D ? depth + kDepth : in.D;
    for (std::int64_t k = 0; k < block.size; k += MR) {
      const char* ahead =
          fetch_next && block.next ? block.next + k * in.D * block.bytes_per_element : nullptr;
      row_product<MR, NV>(logits + k * lanes, lanes, block.rows + k, query, lanes, depth, depth_end,
                          depth > 0, ahead, MR * block.bytes_per_element);
    }
  }
  for (std::int64_t k = 0; k < block.size; ++k) {
    const std::int64_t j = block.begin + k;
    const C scale = static_cast<C>(in.inv_temperature) *
                    (in.bank_scale != nullptr ? static_cast<const C*>(in.bank_scale)[j] : C{1});
    const bool is_negative = in.valid == nullptr || in.valid[j];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      C* at = logits + k * lanes + v * kLanes<C>;
      store(at, is_negative ? load<Vec<C>>(at) * scale : splat(-kInfinity<C>));
    }
  }
  if (in.labels != nullptr) mask_same_label<NV>(logits, in, tile * lanes, block);
  for (std::int64_t lane = 0;
       in.exclude_index != nullptr && lane < lanes && tile * lanes + lane < in.B; ++lane) {
    const std::int64_t k = in.exclude_index[tile * lanes + lane] - block.begin;
    if (k >= 0 && k < block.size) logits[k * lanes + lane] = -kInfinity<C>;
  }
}

// Brings the shift up to the block's maximum where that exceeds it by more than kSlack, and the
// sums with it.
template <int NV, typename C>
void follow_maximum(const C* logits, std::int64_t num_rows, C* shift, double* total, C* sums,
                    C* weighted_rows, std::int64_t D) {
  using V = Vec<C>;
  constexpr std::int64_t lanes = NV * kLanes<C>;
  V maximum[NV], factor[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) maximum[v] = splat(-kInfinity<C>);
  for (std::int64_t k = 0; k < num_rows; ++k) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const V s = load<V>(logits + k * lanes + v * kLanes<C>);
      maximum[v] = s > maximum[v] ? s : maximum[v];
    }
  }
  bool moves = false;
  for (int v = 0; v < NV; ++v) {
    const V old = load<V>(shift + v * kLanes<C>);
    const auto moved = maximum[v] > old + static_cast<C>(kSlack);
    factor[v] = moved ? exp(old - maximum[v]) : splat(C{1});
    store(shift + v * kLanes<C>, moved ? maximum[v] : old);
    for (int lane = 0; lane < kLanes<C>; ++lane) moves |= moved[lane] != 0;
  }
  if (!moves) return;
  for (std::int64_t lane = 0; lane < lanes; ++lane)
    total[lane] *= factor[lane / kLanes<C>][lane % kLanes<C>];
  for (std::int64_t d = 0; d < D; ++d) {
    for (int v = 0; v < NV; ++v) {
      C* sum = sums + d * lanes + v * kLanes<C>;
      C* weighted = weighted_rows + d * lanes + v * kLanes<C>;
      store(sum, load<V>(sum) * factor[v]);
      store(weighted, load<V>(weighted) * factor[v]);
    }
  }
}

// logits <- weight * bank_scale; adds the terms to total.
template <int NV, typename Objective, typename C>
void block_weights(const Objective& objective, C* logits, const BankContrastInputs& in,
                   const Block<C>& block, const C* shift, double* total) {
  using V = Vec<C>;
  constexpr std::int64_t lanes = NV * kLanes<C>;
  V sum[NV] = {}, offset[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const V value = load<V>(shift + v * kLanes<C>);
    offset[v] = value == -kInfinity<C> ? V{} : value;  // no negative so far: e^(-inf - 0) is 0
  }
  for (std::int64_t k = 0; k < block.size; ++k) {
    const std::int64_t j = block.begin + k;
    const bool scaled = in.bank_scale != nullptr && (in.valid == nullptr || in.valid[j]);
    const C scale = scaled ? static_cast<const C*>(in.bank_scale)[j] : C{1};
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      C* at = logits + k * lanes + v * kLanes<C>;
      const auto [term, weight] = objective(load<V>(at), offset[v]);
      sum[v] += term;
      store(at, weight * scale);
    }
  }
  for (std::int64_t lane = 0; lane < lanes; ++lane) {
    total[lane] += static_cast<double>(sum[lane / kLanes<C>][lane % kLanes<C>]);
  }
}

template <int NV, typename C>
void add_weighted_rows(C* sums, const C* weights, const Block<C>& block, std::int64_t D) {
  constexpr int MR = tile_rows(NV);
  constexpr std::int64_t lanes = NV * kLanes<C>;
  std::int64_t d = 0;
  for (; d + MR <= D; d += MR) {
    column_product<MR, NV>(sums + d * lanes, lanes, block.rows, d, block.size, weights, lanes);
  }
  for (; d + 4 <= D; d += 4) {
    column_product<4, NV>(sums + d * lanes, lanes, block.rows, d, block.size, weights, lanes);
  }
  for (; d < D; ++d)
    column_product<1, NV>(sums + d * lanes, lanes, block.rows, d, block.size, weights, lanes);
}

template <typename C>
void end_run(C* total, C* run, std::int64_t size) {
  for (std::int64_t n = 0; n < size; ++n) {
    total[n] += run[n];
    run[n] = 0;
  }
}

template <typename C>
void fill(C* out, std::int64_t size, C value) {
  for (std::int64_t n = 0; n < size; ++n) out[n] = value;
}

template <int NV, typename Objective, typename C>
void scan_tiles(const Objective& objective, const BankSums<C>& out, const BankTask<C>& task) {
  constexpr std::int64_t lanes = NV * kLanes<C>;
  const std::int64_t D = task.inputs->D, num_tiles = task.tile_end - task.tile_begin;
  const Scratch<C> scratch(task.scratch, lanes, D);
  fill(scratch.zero_row, D, C{0});
  fill(scratch.sums, num_tiles * D * lanes, C{0});
  fill(out.weighted_rows, num_tiles * D * lanes, C{0});
  fill(out.total, num_tiles * lanes, 0.0);
  Block<C> block;
  std::int64_t blocks = 0;
  for (std::int64_t begin = task.row_begin; begin < task.row_end; begin += block.size) {
    load_block(block, scratch, task, begin);
    for (std::int64_t n = 0; n < num_tiles; ++n) {
      C* shift = out.shift + n * lanes;
      double* total = out.total + n * lanes;
      C* sums = scratch.sums + n * D * lanes;
      block_logits<NV>(scratch.logits, task, task.tile_begin + n, block, n == 0);
      if constexpr (Objective::kFollowsMaximum) {
        follow_maximum<NV>(scratch.logits, block.size, shift, total, sums,
                           out.weighted_rows + n * D * lanes, D);
      }
      block_weights<NV>(objective, scratch.logits, *task.inputs, block, shift, total);
      add_weighted_rows<NV>(sums, scratch.logits, block, D);
    }
    if (++blocks % kBlocksPerRun == 0)
      end_run(out.weighted_rows, scratch.sums, num_tiles * D * lanes);
  }
  end_run(out.weighted_rows, scratch.sums, num_tiles * D * lanes);
}

// logits <- weight * coefficient, with lse for shift: what each query adds of itself to each row's
// gradient. 0 where lse_high is +inf: that marks lanes past B, and their logits, 0 times the row,
// may be NaN.
template <int NV, typename Objective, typename C>
void block_coefficients(const Objective& objective, C* logits, std::int64_t num_rows,
                        const C* lse_high, const C* lse_low, const C* coefficient) {
  for (std::int64_t k = 0; k < num_rows; ++k) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      C* at = logits + (k * NV + v) * kLanes<C>;
      const Vec<C> high = load<Vec<C>>(lse_high + v * kLanes<C>);
      const Vec<C> low = load<Vec<C>>(lse_low + v * kLanes<C>);
      const Vec<C> weight = objective(load<Vec<C>>(at) - high, low).weight;
      const Vec<C> product = weight * load<Vec<C>>(coefficient + v * kLanes<C>);
      store(at, high == kInfinity<C> ? Vec<C>{} : product);
    }
  }
}

// gradient (num_rows, columns) += coefficients (num_rows, lanes) x queries (lanes, columns).
template <typename C>
void add_queries(C* gradient, std::int64_t columns, const C* coefficients, std::int64_t num_rows,
                 const C* queries, std::int64_t lanes) {
  constexpr int NV = kMaxTileVectors, MR = tile_rows(NV), MR1 = tile_rows(1);
  const C* rows[kMaxBlockRows + kMaxTileRows];
  for (std::int64_t k = 0; k < num_rows + kMaxTileRows; ++k) rows[k] = coefficients + k * lanes;
  std::int64_t column = 0;
  for (; column + NV * kLanes<C> <= columns; column += NV * kLanes<C>) {
    for (std::int64_t k = 0; k < num_rows; k += MR) {
      row_product<MR, NV>(gradient + k * columns + column, columns, rows + k, queries + column,
                          columns, 0, lanes, true, nullptr, 0);
    }
  }
  for (; column < columns; column += kLanes<C>) {
    for (std::int64_t k = 0; k < num_rows; k += MR1) {
      row_product<MR1, 1>(gradient + k * columns + column, columns, rows + k, queries + column,
                          columns, 0, lanes, true, nullptr, 0);
    }
  }
}

template <typename C>
void store_gradient(void* dbank, const BankContrastInputs& in, const Block<C>& block,
                    const C* gradient, std::int64_t columns) {
  with_storage(in.bank_dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for (std::int64_t k = 0; k < block.size; ++k) {
      const std::int64_t j = block.begin + k;
      const bool scaled = in.bank_scale != nullptr && (in.valid == nullptr || in.valid[j]);
      const C scale = scaled ? static_cast<const C*>(in.bank_scale)[j] : C{1};
      T* row = static_cast<T*>(dbank) + j * in.D;
      for (std::int64_t d = 0; d < in.D; ++d) {
        from_compute(static_cast<Compute<T>>(gradient[k * columns + d] * scale), &row[d]);
      }
    }
  });
}

template <int NV, typename Objective, typename C>
void backward_tiles(const Objective& objective, const BankGradient<C>& out,
                    const BankTask<C>& task) {
  constexpr std::int64_t lanes = NV * kLanes<C>;
  const BankContrastInputs& in = *task.inputs;
  const std::int64_t columns = padded_dim<C>(in.D);
  const Scratch<C> scratch(task.scratch, lanes, in.D);
  fill(scratch.zero_row, in.D, C{0});
  // Register tiles run past the last row: what is read there must be numbers, though nobody reads
  // the result.
  fill(scratch.logits, (kMaxBlockRows + kMaxTileRows) * lanes, C{0});
  const std::int64_t size = (kMaxBlockRows + kMaxTileRows) * columns;
  constexpr std::int64_t tiles_per_run = kQueriesPerRun / lanes;
  const bool is_one_run = task.tile_end - task.tile_begin <= tiles_per_run;
  C *run = scratch.sums, *gradient = is_one_run ? run : run + size;
  Block<C> block;
  for (std::int64_t begin = task.row_begin; begin < task.row_end; begin += block.size) {
    load_block(block, scratch, task, begin);
    fill(run, size, C{0});
    if (!is_one_run) fill(gradient, size, C{0});
    for (std::int64_t tile = task.tile_begin; tile < task.tile_end; ++tile) {
      block_logits<NV>(scratch.logits, task, tile, block, tile == task.tile_begin);
      block_coefficients<NV>(objective, scratch.logits, block.size, out.lse_high + tile * lanes,
                             out.lse_low + tile * lanes, out.coefficient + tile * lanes);
      add_queries(run, columns, scratch.logits, block.size, out.row_query + tile * lanes * columns,
                  lanes);
      const bool ends =
          tile + 1 == task.tile_end || (tile + 1 - task.tile_begin) % tiles_per_run == 0;
      if (!is_one_run && ends) end_run(gradient, run, size);
    }
    store_gradient(out.dbank, in, block, gradient, columns);
  }
}

template <typename C>
void scan(const BankSums<C>& out, const BankTask<C>& task) {
  with_objective<C>(*task.inputs, [&](const auto& objective) {
    if (task.lanes == kLanes<C>) return scan_tiles<1>(objective, out, task);
    if (task.lanes == 2 * kLanes<C>) return scan_tiles<2>(objective, out, task);
    scan_tiles<kMaxTileVectors>(objective, out, task);
  });
}

template <typename C>
void backward(const BankGradient<C>& out, const BankTask<C>& task) {
  with_objective<C>(*task.inputs, [&](const auto& objective) {
    if (task.lanes == kLanes<C>) return backward_tiles<1>(objective, out, task);
    if (task.lanes == 2 * kLanes<C>) return backward_tiles<2>(objective, out, task);
    backward_tiles<kMaxTileVectors>(objective, out, task);
  });
}

}  // namespace

extern const BankKernels<float> kBankKernelsFloat = {kLanes<float>,     kMaxTileVectors,
                                                     padded_dim<float>, scratch_size<float>,
                                                     scan<float>,       backward<float>};
extern const BankKernels<double> kBankKernelsDouble = {kLanes<double>,     kMaxTileVectors,
                                                       padded_dim<double>, scratch_size<double>,
                                                       scan<double>,       backward<double>};

}  // namespace CODIR_FAST_ISA_NAMESPACE
}  // namespace codir_fast
