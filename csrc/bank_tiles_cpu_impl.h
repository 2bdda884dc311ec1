// What passes over rows by tiles of queries share on the CPU, bank_contrast's and
// in_batch_contrast's: register tiles of the products, blocks of rows that stay in cache, masks.
// Include only from files that are compiled once per instruction set.
#pragma once

#include <limits>
#include <type_traits>

#include "bank_contrast.h"
#include "bank_contrast_cpu_impl.h"
#include "simd/vec.h"
#include "storage.h"
#include "tile_products_cpu_impl.h"

namespace codir_fast {
namespace {

constexpr std::int64_t kMaxBlockRows = 126, kMinBlockRows = 42;  // multiples of 6 and 14
constexpr std::int64_t kBlockElements = 1 << 15;                 // of a block, within those bounds
constexpr std::int64_t kDepth = 128;  // a query's elements that stay in L1 meanwhile
constexpr std::int64_t kBlocksPerRun = 64, kQueriesPerRun = 512;
constexpr std::int64_t kMaxLanes = kMaxTileVectors * kVectorBytes / 4;

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

// A sum for each lane, of groups of a register tile's rows and then of these: none stagnates.
template <int NV, typename C>
struct GroupedSum {
  Vec<C> group[NV] = {}, total[NV] = {};

  void add(Vec<C> term, int v) { group[v] += term; }

  void end_group() {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      total[v] += group[v];
      group[v] = Vec<C>{};
    }
  }

  void add_to(double* totals) const {
    for (int lane = 0; lane < NV * kLanes<C>; ++lane)
      totals[lane] += static_cast<double>(total[lane / kLanes<C>][lane % kLanes<C>]);
  }
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

// Scratch space of one task: of every pass, and behind it `sums`, whatever a pass adds up.
template <typename C>
struct Scratch {
  C* products;   // (kMaxBlockRows + kMaxTileRows, lanes)
  C* zero_row;   // (D,)
  C* converted;  // (kMaxBlockRows, D)
  C* sums;

  Scratch(C* memory, std::int64_t lanes, std::int64_t D)
      : products(memory),
        zero_row(products + (kMaxBlockRows + kMaxTileRows) * lanes),
        converted(zero_row + padded_dim<C>(D)),
        sums(converted + kMaxBlockRows * padded_dim<C>(D)) {}

  // Without the sums.
  static std::int64_t size(std::int64_t lanes, std::int64_t D) {
    return (kMaxBlockRows + kMaxTileRows) * lanes + (kMaxBlockRows + 1) * padded_dim<C>(D);
  }
};

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

// products (rows, NV vectors) <- use(gap, bank_scale, v) of gap = use.gap(product, logit_scale, v),
// or -inf where the row is no negative; before each row k of the block, use.begin_row(k).
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
    use.begin_row(k);
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

// gradient (num_rows, columns) += coefficients (num_rows, lanes) x queries (lanes, columns), of
// which num_queries lanes are queries.
template <typename C>
void add_queries(C* gradient, std::int64_t columns, const C* coefficients, std::int64_t num_rows,
                 const C* queries, std::int64_t lanes, std::int64_t num_queries) {
  constexpr int NV = kMaxTileVectors, MR = tile_rows(NV), MR1 = tile_rows(1);
  const C* rows[kMaxBlockRows + kMaxTileRows];
  for (std::int64_t k = 0; k < num_rows + kMaxTileRows; ++k) rows[k] = coefficients + k * lanes;
  std::int64_t column = 0;
  for (; column + NV * kLanes<C> <= columns; column += NV * kLanes<C>) {
    for (std::int64_t k = 0; k < num_rows; k += MR) {
      row_product<MR, NV>(gradient + k * columns + column, columns, rows + k, queries + column,
                          columns, 0, num_queries, true, nullptr, 0);
    }
  }
  for (; column < columns; column += kLanes<C>) {
    for (std::int64_t k = 0; k < num_rows; k += MR1) {
      row_product<MR1, 1>(gradient + k * columns + column, columns, rows + k, queries + column,
                          columns, 0, num_queries, true, nullptr, 0);
    }
  }
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

// Calls run with the number of vectors in a tile, as a compile-time number.
template <typename C, int NV = kMaxTileVectors, typename Run>
void with_vectors(std::int64_t lanes, const Run& run) {
  if constexpr (NV > 1) {
    if (lanes != NV * kLanes<C>) return with_vectors<C, NV - 1>(lanes, run);
  }
  run(std::integral_constant<int, NV>());
}

}  // namespace
}  // namespace codir_fast
