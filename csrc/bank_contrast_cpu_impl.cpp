// The pass over the bank on the CPU, for one instruction set (CODIR_FAST_ISA_NAMESPACE).
// The bank is cut into blocks of rows that stay in cache; per block and tile of queries: S^T =
// block x queries as it lies (broadcast bank elements x query vectors), masks, weights P^T of the
// objective (e^(S^T - shift) for InfoNCE), then O^T += block^T x P^T. Never materialised: logits
// beyond one block x tile. Sums are hierarchical (l: group of rows, block, total; O: block, run of
// blocks, total; the bank's gradient: over tiles), so that none stagnates on rows that are alike.
#include "bank_contrast_cpu_impl.h"

#include <limits>
#include <type_traits>

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
constexpr int tile_rows(int NV) { return NV == 4 ? 6 : NV == 3 ? 9 : 14; }
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
// Weights may grow to e^kSlack before the shift follows the maximum, so that O is seldom rescaled;
// the largest may begin at e^-kDrop, so that a first shift that is an upper bound is often kept.
constexpr int kSlack = 8, kDrop = 30;

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

// A block of bank rows as the products want it. Past the last row and at invalid rows: a row of
// zeros that is out.
template <typename C>
struct Block {
  const C* rows[kMaxBlockRows + kMaxTileRows];
  C logit_scale[kMaxBlockRows + kMaxTileRows];  // bank_scale / t
  C bank_scale[kMaxBlockRows + kMaxTileRows];
  typename Simd<C>::Int is_out[kMaxBlockRows + kMaxTileRows];  // all bits, or none
  std::int64_t begin, size;
  bool has_out;      // among the rows that register tiles reach
  const char* next;  // the block after this one in the bank, null at the end
  std::int64_t bytes_per_element;
};

// Which rows of a block are no negatives of the queries of a tile.
template <typename C>
struct TileMask {
  using Int = typename Simd<C>::Int;
  // Labels as two halves: vectors of the width of C compare all 64 bits.
  Int label_low[kMaxLanes] = {}, label_high[kMaxLanes] = {};
  Int excluded[kMaxLanes];  // number in the block, -1 for none of it
  const std::int64_t* row_labels = nullptr;
  bool is_any;

  TileMask(const BankContrastInputs& in, const Block<C>& block, std::int64_t query_begin,
           std::int64_t lanes)
      : is_any(block.has_out || in.labels != nullptr) {
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
      excluded[lane] = -1;
      const std::int64_t i = query_begin + lane;
      if (i >= in.B) continue;
      if (in.exclude_index != nullptr) {
        const std::int64_t k = in.exclude_index[i] - block.begin;
        if (k >= 0 && k < block.size) {
          excluded[lane] = static_cast<Int>(k);
          is_any = true;
        }
      }
      if (in.labels != nullptr) {
        label_low[lane] = static_cast<Int>(in.labels[i]);
        label_high[lane] = static_cast<Int>(in.labels[i] >> 32);
      }
    }
    if (in.labels != nullptr) row_labels = in.bank_labels + block.begin;
  }
};

// Scratch space of one task, as scratch_size counts it.
template <typename C>
struct Scratch {
  C* products;   // (kMaxBlockRows + kMaxTileRows, lanes)
  C* zero_row;   // (D,)
  C* converted;  // (kMaxBlockRows, D)
  C* sums;       // forward: [tile][d][lane] of the run of blocks; backward: gradient of the block
                 // from the run of tiles, padded_dim columns, then that from all runs

  Scratch(C* memory, std::int64_t lanes, std::int64_t D)
      : products(memory),
        zero_row(products + (kMaxBlockRows + kMaxTileRows) * lanes),
        converted(zero_row + padded_dim<C>(D)),
        sums(converted + kMaxBlockRows * padded_dim<C>(D)) {}
};

template <typename C>
std::int64_t scratch_size(std::int64_t lanes, std::int64_t D, std::int64_t num_tiles) {
  const std::int64_t forward = num_tiles * D * lanes,
                     backward = 2 * (kMaxBlockRows + kMaxTileRows) * padded_dim<C>(D);
  return (kMaxBlockRows + kMaxTileRows) * lanes + (kMaxBlockRows + 1) * padded_dim<C>(D) +
         (num_tiles > 0 ? forward : backward);
}

template <typename C>
void load_block(Block<C>& block, const Scratch<C>& scratch, const BankTask<C>& task,
                std::int64_t begin, std::int64_t tile_rows) {
  const BankContrastInputs& in = *task.inputs;
  const std::int64_t most = block_rows(in.D), left = task.row_end - begin;
  block.begin = begin;
  block.size = left < most ? left : most;
  block.has_out = block.size % tile_rows != 0;
  with_storage(in.bank_dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* bank = static_cast<const T*>(in.bank) + begin * in.D;
    block.next = left > most ? reinterpret_cast<const char*>(bank + most * in.D) : nullptr;
    block.bytes_per_element = sizeof(T);
    for (std::int64_t k = 0; k < block.size + kMaxTileRows; ++k) {
      const std::int64_t j = begin + k;
      const bool counts = k < block.size && (in.valid == nullptr || in.valid[j]);
      if (k < block.size && !counts) block.has_out = true;
      block.rows[k] = scratch.zero_row;
      block.bank_scale[k] = !counts                    ? C{0}
                            : in.bank_scale != nullptr ? static_cast<const C*>(in.bank_scale)[j]
                                                       : C{1};
      block.logit_scale[k] = static_cast<C>(in.inv_temperature) * block.bank_scale[k];
      block.is_out[k] = counts ? 0 : -1;
      if (!counts) continue;
      const T* row = bank + k * in.D;
      if constexpr (std::is_same_v<T, C>) {
        block.rows[k] = row;
      } else {
        C* converted = scratch.converted + k * in.D;
        convert(converted, row, in.D);
        block.rows[k] = converted;
      }
    }
  });
}

// products (rows, NV vectors) <- use(product, v, k), with NV functions of what lies there; -inf
// ends up where a row is no negative.
template <int NV, bool kMasked, typename Use, typename C>
void visit(Use& use, C* products, const Block<C>& block, const TileMask<C>& mask,
           std::int64_t begin, std::int64_t end) {
  using V = Vec<C>;
  using Int = typename Simd<C>::Int;
  using IV = IntVec<C>;
  for (std::int64_t k = begin; k < end; ++k) {
    const V scale = splat(block.logit_scale[k]), bank_scale = splat(block.bank_scale[k]);
    const bool has_label = kMasked && mask.row_labels != nullptr && k < block.size;
    const std::int64_t label = has_label ? mask.row_labels[k] : 0;
    const IV low = static_cast<Int>(label) - IV{}, high = static_cast<Int>(label >> 32) - IV{};
    const IV number = static_cast<Int>(k) - IV{};
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      C* at = products + (k * NV + v) * kLanes<C>;
      V gap = use.gap(load<V>(at), scale, v);
      if constexpr (kMasked) {
        IV is_out = (load<IV>(mask.excluded + v * kLanes<C>) == number) | block.is_out[k];
        if (has_label) {
          is_out |= (load<IV>(mask.label_low + v * kLanes<C>) == low) &
                    (load<IV>(mask.label_high + v * kLanes<C>) == high);
        }
        gap = is_out ? splat(-kInfinity<C>) : gap;
      }
      store(at, use(gap, bank_scale, v));
    }
  }
}

// S^T of the block with one tile of queries, each group of rows handed to `use` while it is in L1;
// (block.size, NV vectors).
template <int NV, typename Use, typename C>
void visit_products(Use& use, C* products, const BankTask<C>& task, std::int64_t tile,
                    const Block<C>& block, bool fetch_next) {
  constexpr int MR = tile_rows(NV);
  constexpr std::int64_t lanes = NV * kLanes<C>;
  const BankContrastInputs& in = *task.inputs;
  const C* query = task.packed_query + tile * in.D * lanes;
  const TileMask<C> mask(in, block, tile * lanes, lanes);
  for (std::int64_t depth = 0; depth < in.D; depth += kDepth) {
    const std::int64_t depth_end = depth + kDepth < in.D ? depth + kDepth : in.D;
    for (std::int64_t k = 0; k < block.size; k += MR) {
      const char* ahead =
          fetch_next && block.next ? block.next + k * in.D * block.bytes_per_element : nullptr;
      row_product<MR, NV>(products + k * lanes, lanes, block.rows + k, query, lanes, depth,
                          depth_end, depth > 0, ahead, MR * block.bytes_per_element);
      if (depth_end < in.D) continue;
      if (mask.is_any) {
        visit<NV, true>(use, products, block, mask, k, k + MR);
      } else {
        visit<NV, false>(use, products, block, mask, k, k + MR);
      }
      use.end_group();
    }
  }
}

// Makes the weights of a block, their sum of terms and the largest s - shift. Logits are rounded,
// as the shift is, which is one of them: where they are huge, a fused product would be far from its
// own. Once the shift has followed the maximum, a gap beyond kSlack is but the rounding of a huge
// shift, and is cut.
template <int NV, typename Objective, typename C>
struct Weigh {
  using V = Vec<C>;
  Objective objective;
  V shift[NV], group[NV], sum[NV], top[NV];

  Weigh(const Objective& objective, const C* shifts) : objective(objective) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      shift[v] = load<V>(shifts + v * kLanes<C>);
      group[v] = sum[v] = V{};
      top[v] = splat(-kInfinity<C>);
    }
  }

  V gap(V product, V scale, int v) const { return rounded(product * scale) - shift[v]; }

  V operator()(V gap, V bank_scale, int v) {
    if constexpr (Objective::kFollowsMaximum) {
      top[v] = gap > top[v] ? gap : top[v];
      gap = gap > C{2 * kSlack} ? splat(C{2 * kSlack}) : gap;
    }
    const auto [term, weight] = objective(gap);
    group[v] += term;
    return weight * bank_scale;
  }

  void end_group() {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      sum[v] += group[v];
      group[v] = V{};
    }
  }
};

// Sums of a tile of queries so far, indexed by lane; `run` and `rows` are [d][lane].
template <typename C>
struct TileSums {
  C* shift;
  double* total;
  C *run, *rows;
};

// Moves the shift to the block's maximum, and the sums with it, where that exceeds it by more than
// kSlack, or where nothing was summed so far and it is kDrop below. Returns whether any moved: the
// block's weights are then of no use.
template <int NV, typename C>
bool follow_maximum(const Vec<C>* top, const TileSums<C>& sums, std::int64_t D) {
  constexpr std::int64_t lanes = NV * kLanes<C>;
  C factor[lanes];
  bool moves = false;
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const auto far = (top[v] > C{kSlack}) | ((top[v] < C{-kDrop}) & (top[v] > -kInfinity<C>));
    for (int lane = 0; lane < kLanes<C>; ++lane) moves |= far[lane] != 0;
  }
  if (!moves) return false;
  moves = false;
  for (std::int64_t lane = 0; lane < lanes; ++lane) {
    const C highest = top[lane / kLanes<C>][lane % kLanes<C>];
    const bool starts = sums.total[lane] == 0;
    factor[lane] = 1;
    if (!(highest > C{kSlack} || (starts && highest < C{-kDrop} && highest > -kInfinity<C>)))
      continue;
    if (!starts) factor[lane] = exp(splat(-highest))[0];
    sums.shift[lane] += highest;
    sums.total[lane] *= static_cast<double>(factor[lane]);
    moves = true;
  }
  for (std::int64_t d = 0; moves && d < D; ++d) {
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
      sums.run[d * lanes + lane] *= factor[lane];
      sums.rows[d * lanes + lane] *= factor[lane];
    }
  }
  return moves;
}

// weights <- those of the block's rows for one tile of queries, times bank_scale; adds the terms to
// its total.
template <int NV, typename Objective, typename C>
void block_weights(const Objective& objective, C* weights, const BankTask<C>& task,
                   std::int64_t tile, const Block<C>& block, const TileSums<C>& sums,
                   bool fetch_next) {
  Weigh<NV, Objective, C> weigh(objective, sums.shift);
  visit_products<NV>(weigh, weights, task, tile, block, fetch_next);
  if constexpr (Objective::kFollowsMaximum) {
    // A huge shift is the maximum only when what the first move rounded away has been added to it.
    for (int moves = 0; moves < 2 && follow_maximum<NV>(weigh.top, sums, task.inputs->D); ++moves) {
      weigh = Weigh<NV, Objective, C>(objective, sums.shift);
      visit_products<NV>(weigh, weights, task, tile, block, false);
    }
  }
  for (std::int64_t lane = 0; lane < NV * kLanes<C>; ++lane) {
    sums.total[lane] += static_cast<double>(weigh.sum[lane / kLanes<C>][lane % kLanes<C>]);
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
    load_block(block, scratch, task, begin, tile_rows(NV));
    for (std::int64_t n = 0; n < num_tiles; ++n) {
      const TileSums<C> sums{out.shift + n * lanes, out.total + n * lanes,
                             scratch.sums + n * D * lanes, out.weighted_rows + n * D * lanes};
      block_weights<NV>(objective, scratch.products, task, task.tile_begin + n, block, sums,
                        n == 0);
      add_weighted_rows<NV>(sums.run, scratch.products, block, D);
    }
    if (++blocks % kBlocksPerRun == 0)
      end_run(out.weighted_rows, scratch.sums, num_tiles * D * lanes);
  }
  end_run(out.weighted_rows, scratch.sums, num_tiles * D * lanes);
}

// Makes what each query adds of itself to each row's gradient: weight * coefficient, with lse for
// shift. 0 where lse_high is +inf: that marks lanes past B, and their logits, 0 times the row, may
// be NaN.
template <int NV, typename Objective, typename C>
struct Coefficients {
  using V = Vec<C>;
  Objective objective;
  const C *lse_high, *lse_low, *coefficient;

  V at(const C* values, int v) const { return load<V>(values + v * kLanes<C>); }

  V gap(V product, V scale, int v) const {
    const V gap = (rounded(product * scale) - at(lse_high, v)) - at(lse_low, v);
    if constexpr (!Objective::kFollowsMaximum) return gap;
    return gap > C{0} ? V{} : gap;  // no logit exceeds lse but by rounding
  }

  V operator()(V gap, V bank_scale, int v) const {
    const V product = objective(gap).weight * at(coefficient, v) * bank_scale;
    return at(lse_high, v) == kInfinity<C> ? V{} : product;
  }

  void end_group() const {}
};

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
      T* row = static_cast<T*>(dbank) + (block.begin + k) * in.D;
      for (std::int64_t d = 0; d < in.D; ++d) {
        from_compute(static_cast<Compute<T>>(gradient[k * columns + d]), &row[d]);
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
  fill(scratch.products, (kMaxBlockRows + kMaxTileRows) * lanes, C{0});
  const std::int64_t size = (kMaxBlockRows + kMaxTileRows) * columns;
  constexpr std::int64_t tiles_per_run = kQueriesPerRun / lanes;
  const bool is_one_run = task.tile_end - task.tile_begin <= tiles_per_run;
  C *run = scratch.sums, *gradient = is_one_run ? run : run + size;
  Block<C> block;
  for (std::int64_t begin = task.row_begin; begin < task.row_end; begin += block.size) {
    load_block(block, scratch, task, begin, tile_rows(NV));
    fill(run, size, C{0});
    if (!is_one_run) fill(gradient, size, C{0});
    for (std::int64_t tile = task.tile_begin; tile < task.tile_end; ++tile) {
      Coefficients<NV, Objective, C> use{objective, out.lse_high + tile * lanes,
                                         out.lse_low + tile * lanes,
                                         out.coefficient + tile * lanes};
      visit_products<NV>(use, scratch.products, task, tile, block, tile == task.tile_begin);
      add_queries(run, columns, scratch.products, block.size,
                  out.row_query + tile * lanes * columns, lanes);
      const bool ends =
          tile + 1 == task.tile_end || (tile + 1 - task.tile_begin) % tiles_per_run == 0;
      if (!is_one_run && ends) end_run(gradient, run, size);
    }
    store_gradient(out.dbank, in, block, gradient, columns);
  }
}

// Calls run with the number of vectors in a tile, as a compile-time number.
template <typename C, int NV = kMaxTileVectors, typename Run>
void with_vectors(std::int64_t lanes, const Run& run) {
  if constexpr (NV > 1) {
    if (lanes != NV * kLanes<C>) return with_vectors<C, NV - 1>(lanes, run);
  }
  run(std::integral_constant<int, NV>());
}

template <typename C>
void scan(const BankSums<C>& out, const BankTask<C>& task) {
  with_objective<C>(*task.inputs, [&](const auto& objective) {
    with_vectors<C>(task.lanes, [&](auto NV) { scan_tiles<NV>(objective, out, task); });
  });
}

template <typename C>
void backward(const BankGradient<C>& out, const BankTask<C>& task) {
  with_objective<C>(*task.inputs, [&](const auto& objective) {
    with_vectors<C>(task.lanes, [&](auto NV) { backward_tiles<NV>(objective, out, task); });
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
