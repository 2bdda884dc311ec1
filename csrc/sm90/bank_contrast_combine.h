// Before and after the pass of bank_contrast: queries brought to unit length in the type that
// products run in, and from sums over splits of the bank to loss and gradients, in double and in a
// fixed order. The formulas are those of kernels/contrast.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "sm90/device.h"
#include "sm90/vector.h"
#include "sm90/weighing.h"

namespace codir_fast {
namespace sm90 {

constexpr double kLn2 = 0.6931471805599453;
constexpr double kMinNormOfRows = 1e-12;  // as in torch.nn.functional.normalize
constexpr int kWarp = 32;

// Columns that the kernels here are compiled for.
CODIR_FAST_HOST_DEVICE constexpr int combined_dim(int D) {
  return D <= 64 ? 64 : D <= 128 ? 128 : D <= 256 ? 256 : kMaxDim;
}
// Warps of a block.
CODIR_FAST_HOST_DEVICE constexpr int combine_warps(int dim) { return dim <= 128 ? 16 : 8; }
// What combine_splits keeps in shared memory.
CODIR_FAST_HOST_DEVICE constexpr int combine_doubles(int dim) { return combine_warps(dim) * dim; }

// Rows of queries or positives: (N, D) of float, or of Half, the 16-bit type of the products.
template <typename Half>
struct Rows {
  const void* data;
  bool is_float;

  CODIR_FAST_DEVICE double at(std::int64_t n) const {
    return is_float ? static_cast<double>(static_cast<const float*>(data)[n])
                    : static_cast<double>(to_float(static_cast<const Half*>(data)[n]));
  }
};

CODIR_FAST_DEVICE double sum_of_warp(double value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
  return value;
}

// A warp's row of up to kDim columns. A lane has vectors of up to 16 bytes of float, neighbours
// beside each other: D is a multiple of their length, so that each is inside or not.
template <int kDim>
struct WarpRow {
  static constexpr int kColumnsOfLane = kDim / kWarp;
  static constexpr int kVector = kColumnsOfLane < 4 ? kColumnsOfLane : 4;
  double value[kColumnsOfLane];

  static CODIR_FAST_DEVICE int column(int c) {
    return (c / kVector * kWarp + thread_index() % kWarp) * kVector + c % kVector;
  }
  template <typename Half>
  CODIR_FAST_DEVICE void load(const Rows<Half>& rows, std::int64_t row, int D) {
#pragma unroll
    for (int c = 0; c < kColumnsOfLane; ++c) {
      const int d = column(c);
      value[c] = d < D ? rows.at(row * D + d) : 0.0;
    }
  }
  CODIR_FAST_DEVICE double dot(const WarpRow& other) const {
    double sum = 0;
#pragma unroll
    for (int c = 0; c < kColumnsOfLane; ++c) sum += value[c] * other.value[c];
    return sum_of_warp(sum);
  }
  // The length to divide by, and makes the row that of unit length.
  CODIR_FAST_DEVICE double normalize() {
    const double norm = sqrt(dot(*this));
    const double divisor = norm > kMinNormOfRows ? norm : kMinNormOfRows;
#pragma unroll
    for (int c = 0; c < kColumnsOfLane; ++c) value[c] /= divisor;
    return divisor;
  }
};

// Blocks of combine_warps(kDim) warps, a warp for each of B rows: unit (B, D) of Half. Without
// `normalize` a copy.
template <int kDim, typename Half>
CODIR_FAST_DEVICE void prepare_queries(Half* unit, const void* query, int B, int D,
                                       bool normalize) {
  let_next_grid_begin();
  const int i = block_index() * combine_warps(kDim) + thread_index() / kWarp;
  if (i >= B) return;
  WarpRow<kDim> row;
  row.load(Rows<Half>{query, false}, i, D);
  if (normalize) row.normalize();
#pragma unroll
  for (int c = 0; c < row.kColumnsOfLane; ++c) {
    const int d = row.column(c);
    if (d < D) from_float(static_cast<float>(row.value[c]), unit + std::int64_t{i} * D + d);
  }
}

struct CombineArguments {
  // Outputs: (B,), and (B, D).
  float* loss;
  double* lse;
  float* dquery;
  float* dpositive;
  float* dinv_temperature;
  // What the pass left; the queries and positives as they were given.
  const float* maximum;
  const float* total;
  const float* rows;
  const void* query;
  const void* positive;
  bool positive_is_float;
  Scalar inv_temperature, log_partition;
  double log_noise;  // log(c + eps)
  int B, D, splits;
  int warps_per_query;  // 1, 2, 4 or 8, at most about as many as splits
  bool nce, normalize;
};

// softplus(a), and sigmoid(a).
CODIR_FAST_DEVICE double logistic(double a, double* sigmoid) {
  const double small = exp(a < 0 ? a : -a);
  *sigmoid = (a > 0 ? 1.0 : small) / (1.0 + small);
  return (a > 0 ? a : 0.0) + log1p(small);
}

// What is known of a query before the pass has ended.
template <int kDim>
struct Pair {
  WarpRow<kDim> query, positive;
  double query_norm, positive_norm, inv_t, positive_logit;

  template <typename Half>
  CODIR_FAST_DEVICE void load(const CombineArguments& a, int i) {
    query.load(Rows<Half>{a.query, false}, i, a.D);
    positive.load(Rows<Half>{a.positive, a.positive_is_float}, i, a.D);
    query_norm = a.normalize ? query.normalize() : 1.0;
    positive_norm = a.normalize ? positive.normalize() : 1.0;
    inv_t = load_scalar(a.inv_temperature);
    positive_logit = query.dot(positive) * inv_t;
  }
};

// One query's sums over splits, relative to 2^maximum.
template <int kDim>
struct Sums {
  double maximum, total;
  WarpRow<kDim> rows;
};

// Splits whose rows a warp reads at once: 8 vectors a lane.
CODIR_FAST_HOST_DEVICE constexpr int splits_in_flight(int dim) {
  return dim <= 128 ? 8 : 1024 / dim;
}

// Maximum and total of all splits, and a warp's share of the rows: of splits from `first` on, every
// `step`-th.
template <int kDim>
CODIR_FAST_DEVICE Sums<kDim> sum_splits(const CombineArguments& a, int i, int first, int step) {
  using RowVector = Vector<float, WarpRow<kDim>::kVector>;
  constexpr int kInFlight = splits_in_flight(kDim), kVector = WarpRow<kDim>::kVector;
  Sums<kDim> sums{};
  float largest = kMinusInfinity;
  for (int n = thread_index() % kWarp; n < a.splits; n += kWarp) {
    const float maximum = a.maximum[std::int64_t{n} * a.B + i];
    largest = largest < maximum ? maximum : largest;
  }
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const float other = shuffle_xor(largest, lanes);
    largest = largest < other ? other : largest;
  }
  sums.maximum = largest;
  const float base = largest == kMinusInfinity ? 0.0f : largest;
  for (int n = thread_index() % kWarp; n < a.splits; n += kWarp) {
    const std::int64_t at = std::int64_t{n} * a.B + i;
    sums.total += static_cast<double>(exp2f(a.maximum[at] - base)) * a.total[at];
  }
  sums.total = sum_of_warp(sums.total);
  for (int n0 = first; n0 < a.splits; n0 += kInFlight * step) {
    float weight[kInFlight];
    RowVector part[kInFlight][kDim / kWarp / kVector];
#pragma unroll
    for (int s = 0; s < kInFlight; ++s) {
      const int n = n0 + s * step;
      const std::int64_t at = std::int64_t{n < a.splits ? n : first} * a.B + i;
      weight[s] = n < a.splits ? exp2f(a.maximum[at] - base) : 0.0f;
#pragma unroll
      for (int c = 0; c < sums.rows.kColumnsOfLane; c += kVector) {
        const int d = sums.rows.column(c);
        if (d < a.D)
          part[s][c / kVector] = *reinterpret_cast<const RowVector*>(a.rows + at * a.D + d);
      }
    }
#pragma unroll
    for (int s = 0; s < kInFlight; ++s) {
      if (n0 + s * step >= a.splits) break;
#pragma unroll
      for (int c = 0; c < sums.rows.kColumnsOfLane; ++c) {
        if (sums.rows.column(c) < a.D)
          sums.rows.value[c] +=
              static_cast<double>(weight[s]) * part[s][c / kVector].value[c % kVector];
      }
    }
  }
  return sums;
}

// One warp: from a query's sums to its outputs.
template <int kDim>
CODIR_FAST_DEVICE void finish_query(const CombineArguments& a, int i, const Pair<kDim>& pair,
                                    const Sums<kDim>& sums) {
  constexpr int kColumnsOfLane = WarpRow<kDim>::kColumnsOfLane;
  const WarpRow<kDim>&query = pair.query, &positive = pair.positive;
  const double inv_t = pair.inv_t, positive_logit = pair.positive_logit;
  double lse, loss, weight;  // weight: what the positive's share lacks of 1
  double share = 1;          // of the summed rows
  if (a.nce) {
    lse = load_scalar(a.log_partition) + a.log_noise;
    loss = logistic(lse - positive_logit, &weight) + sums.total;
  } else {
    // No negative: total 0, gap -inf, loss 0.
    const double gap = sums.maximum * kLn2 - positive_logit + log(sums.total);
    loss = logistic(gap, &weight);
    lse = positive_logit + loss;
    share = weight / (sums.total == 0 ? 1.0 : sums.total);
  }
  WarpRow<kDim> direction;
#pragma unroll
  for (int c = 0; c < kColumnsOfLane; ++c)
    direction.value[c] = share * sums.rows.value[c] - weight * positive.value[c];
  const double dinv_temperature = query.dot(direction);
  // Back through the division by the length, which is constant below kMinNormOfRows.
  const bool query_moves = a.normalize && pair.query_norm > kMinNormOfRows;
  const bool positive_moves = a.normalize && pair.positive_norm > kMinNormOfRows;
  const double along_query = query_moves ? dinv_temperature * inv_t : 0.0;
  const double along_positive = positive_moves ? -weight * positive_logit : 0.0;
#pragma unroll
  for (int c = 0; c < kColumnsOfLane; ++c) {
    const int d = direction.column(c);
    if (d >= a.D) continue;
    const std::int64_t at = std::int64_t{i} * a.D + d;
    a.dquery[at] = static_cast<float>((direction.value[c] * inv_t - along_query * query.value[c]) /
                                      pair.query_norm);
    a.dpositive[at] =
        static_cast<float>((-weight * inv_t * query.value[c] - along_positive * positive.value[c]) /
                           pair.positive_norm);
  }
  if (thread_index() % kWarp == 0) {
    a.loss[i] = static_cast<float>(loss);
    a.lse[i] = lse;
    a.dinv_temperature[i] = static_cast<float>(dinv_temperature);
  }
}

// Blocks of combine_warps(kDim) warps, warps_per_query for each query. `exchange`:
// combine_doubles(kDim) in shared memory.
template <int kDim, typename Half>
CODIR_FAST_DEVICE void combine_splits(const CombineArguments& a, double* exchange) {
  const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
  const int member = warp % a.warps_per_query;
  const int i =
      block_index() * (combine_warps(kDim) / a.warps_per_query) + warp / a.warps_per_query;
  const bool is_last = member == 0 && i < a.B;
  constexpr int kColumnsOfLane = WarpRow<kDim>::kColumnsOfLane;
  Pair<kDim> pair{};
  if (is_last) pair.template load<Half>(a, i);
  wait_for_previous_grid();
  Sums<kDim> sums{};
  if (i < a.B) sums = sum_splits<kDim>(a, i, member, a.warps_per_query);
  if (a.warps_per_query > 1) {
    double* mine = exchange + warp * kDim;
    for (int c = 0; c < kColumnsOfLane; ++c) mine[lane + kWarp * c] = sums.rows.value[c];
    sync_block();
    for (int other = 1; member == 0 && other < a.warps_per_query; ++other) {
      const double* theirs = mine + other * kDim;
      for (int c = 0; c < kColumnsOfLane; ++c) sums.rows.value[c] += theirs[lane + kWarp * c];
    }
  }
  if (is_last) finish_query<kDim>(a, i, pair, sums);
}

}  // namespace sm90
}  // namespace codir_fast
