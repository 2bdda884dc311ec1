// The pass over the bank on the CPU, for one instruction set (CODIR_FAST_ISA_NAMESPACE).
// The bank is cut into blocks of rows that stay in cache; per block and tile of queries: S^T =
// block x queries as it lies (broadcast bank elements x query vectors), masks, weights P^T of the
// objective (e^(S^T - shift) for InfoNCE), then O^T += block^T x P^T. Never materialised: logits
// beyond one block x tile. Sums are hierarchical (l: group of rows, block, total; O: block, run of
// blocks, total; the bank's gradient: over tiles), so that none stagnates on rows that are alike.
#include "bank_contrast_cpu_impl.h"

#include <type_traits>

#include "bank_tiles_cpu_impl.h"
#include "objective.h"

namespace codir_fast {
namespace CODIR_FAST_ISA_NAMESPACE {
namespace {

// Weights may grow to e^kSlack before the shift follows the maximum, so that O is seldom rescaled;
// the largest may begin at e^-kDrop, so that a first shift that is an upper bound is often kept.
constexpr int kSlack = 8, kDrop = 30;

// The sums are, forward: [tile][d][lane] of the run of blocks; backward: the gradient of the block
// from the run of tiles, padded_dim columns, then that from all runs.
template <typename C>
std::int64_t scratch_size(std::int64_t lanes, std::int64_t D, std::int64_t num_tiles) {
  const std::int64_t forward = num_tiles * D * lanes,
                     backward = 2 * (kMaxBlockRows + kMaxTileRows) * padded_dim<C>(D);
  return Scratch<C>::size(lanes, D) + (num_tiles > 0 ? forward : backward);
}

// Makes the weights of a block, their sum of terms and the largest s - shift. Logits are rounded,
// as the shift is, which is one of them: where they are huge, a fused product would be far from its
// own. Once the shift has followed the maximum, a gap beyond kSlack is but the rounding of a huge
// shift, and is cut.
template <int NV, typename Objective, typename C>
struct Weigh {
  using V = Vec<C>;
  Objective objective;
  V shift[NV], top[NV];
  GroupedSum<NV, C> sum;

  Weigh(const Objective& objective, const C* shifts) : objective(objective) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      shift[v] = load<V>(shifts + v * kLanes<C>);
      top[v] = splat(-kInfinity<C>);
    }
  }

  void begin_row(std::int64_t) const {}

  V gap(V product, V scale, int v) const { return rounded(product * scale) - shift[v]; }

  V operator()(V gap, V bank_scale, int v) {
    if constexpr (Objective::kFollowsMaximum) {
      top[v] = gap > top[v] ? gap : top[v];
      gap = gap > C{2 * kSlack} ? splat(C{2 * kSlack}) : gap;
    }
    const auto [term, weight] = objective(gap);
    sum.add(term, v);
    return weight * bank_scale;
  }

  void end_group() { sum.end_group(); }
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
  weigh.sum.add_to(sums.total);
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

  void begin_row(std::int64_t) const {}

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
                  out.row_query + tile * lanes * columns, lanes, lanes);
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
