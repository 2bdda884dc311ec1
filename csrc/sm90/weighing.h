// From logits to weights, in the registers of a consumer of the pass. A thread holds two queries'
// parts of a tile of logits: element 4 i + 2 r + c is query r, column 8 i + 2 (thread % 4) + c (see
// wgmma.h).
#pragma once

#include <cstdint>

#include "sm90/bank_contrast_plan.h"
#include "sm90/device.h"
#include "sm90/scalar.h"

namespace codir_fast {
namespace sm90 {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMinusInfinity = -__builtin_inff();

CODIR_FAST_DEVICE double load_scalar(const Scalar& s) {
  if (s.on_device == nullptr) return s.value;
  return s.is_double ? *static_cast<const double*>(s.on_device)
                     : static_cast<double>(*static_cast<const float*>(s.on_device));
}

// 1/t in units of log 2: e^{-2/t} is still a normal number, t >= 0.0231.
constexpr float kMaxFixedShift = 62.5f;
// Of weights under the fixed shift; below, they may have lost digits to underflow, and above, the
// sum of their rows may overflow: elements up to 2^27 fit.
constexpr float kSmallestTotal = 0x1p-100f;
constexpr float kLargestTotal = 0x1p100f;
// A maximum that grew by no more than this, in units of log 2, stays: weights up to 2^8 fit every
// type, and sums are seldom rescaled.
constexpr float kSlack = 8.0f;
constexpr float kHalfWeightScale = 32768;  // of sigmoids in float16

// Sum and maximum of two queries over the tiles so far. `finish` adds up the four threads that
// share them.
template <Weighing kWeighing>
struct Weigher {
  static constexpr bool kMasked = kWeighing != Weighing::kFixedShift;

  float factor;  // of logits: 1/t, in units of log 2 unless NCE
  float offset, extra;
  float maximum[2], total[2], lost[2];  // lost: what rounding took from the totals
  float scale[2];                       // of sums from before the last tile
  std::uint32_t label_low[2], label_high[2];
  int excluded[2];

  CODIR_FAST_DEVICE Weigher(const Scalar& inv_temperature, const Scalar& log_partition,
                            float log_noise, float extra)
      : offset(0), extra(extra) {
    const double inv_t = load_scalar(inv_temperature);
    factor = static_cast<float>(inv_t);
    if (kWeighing == Weighing::kNce)
      offset = static_cast<float>(load_scalar(log_partition)) + log_noise;
    else
      factor *= kLog2E;
  }

  CODIR_FAST_DEVICE void begin(const std::int64_t* labels, const std::int64_t* exclude_index,
                               int first_query, int B, int K) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Past the last query: what the last one has, and nobody looks at.
      const int query = first_query + 8 * r < B ? first_query + 8 * r : B - 1;
      maximum[r] = kWeighing == Weighing::kFixedShift       ? factor
                   : kWeighing == Weighing::kRunningMaximum ? kMinusInfinity
                                                            : 0.0f;
      total[r] = lost[r] = 0;
      scale[r] = 1;
      if (!kMasked) continue;
      const std::uint64_t label = labels != nullptr ? static_cast<std::uint64_t>(labels[query]) : 0;
      label_low[r] = static_cast<std::uint32_t>(label);
      label_high[r] = static_cast<std::uint32_t>(label >> 32);
      const std::int64_t row = exclude_index != nullptr ? exclude_index[query] : -1;
      // Relative to this thread's first column; before any tile where there is none.
      excluded[r] = row >= 0 && row < K ? static_cast<int>(row) - column(0) : -8;
    }
  }

  // -inf from column `end` of the tile on.
  template <int N>
  CODIR_FAST_DEVICE void cut(float (&logits)[N], int end) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (column(i) >= end) logits[i] = kMinusInfinity;
    }
  }

  // Weights in place of the products q.b of a tile that begins at bank row `first_row`; in a masked
  // pass `columns` is where its rows are described. With kRunningMaximum `agree` may raise the
  // largest logits that the maximum follows, one of each query, to those of other tiles.
  template <int N, typename Agree>
  CODIR_FAST_DEVICE void weigh(float (&logits)[N], int first_row, std::uint32_t columns,
                               const Agree& agree) {
    if (kMasked) mask(logits, first_row, columns);
    if (kWeighing == Weighing::kRunningMaximum) {
      float largest[2] = {kMinusInfinity, kMinusInfinity};
      find_largest(logits, largest);
      agree(largest);
      follow_maximum(largest);
    }
    float added[2][2] = {};  // two sums a query: shorter chains
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int r = i / 2 % 2;
      added[r][i % 2] += kWeighing == Weighing::kNce ? nce(logits[i]) : infonce(logits[i], r);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) add(r, added[r][0] + added[r][1]);
  }

  // Brings sums from before the last `weigh` or `merge` to the maximum of now.
  template <int N>
  CODIR_FAST_DEVICE void rescale(float (&rows)[N]) {
    if (kWeighing != Weighing::kRunningMaximum) return;
    if (!any_in_warp(scale[0] != 1 || scale[1] != 1)) return;
#pragma unroll
    for (int i = 0; i < N; ++i) rows[i] *= scale[i / 2 % 2];
  }

  // After the last tile.
  CODIR_FAST_DEVICE void finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] += shuffle_xor(total[r], 1);
      total[r] += shuffle_xor(total[r], 2);
      // A temperature too low for the fixed shift: the pass after this one sees it.
      if (kWeighing == Weighing::kFixedShift && !(factor <= kMaxFixedShift))
        total[r] = -kMinusInfinity;
    }
  }

  // Takes another consumer's finished sums of query r in; the factor of its rows.
  CODIR_FAST_DEVICE float merge(int r, float other_maximum, float other_total) {
    if (kWeighing != Weighing::kRunningMaximum) {
      total[r] += other_total;
      return 1;
    }
    const float larger = maximum[r] < other_maximum ? other_maximum : maximum[r];
    const float base = larger == kMinusInfinity ? 0.0f : larger;
    scale[r] = exp2_approx(maximum[r] - base);
    const float share = exp2_approx(other_maximum - base);
    total[r] = total[r] * scale[r] + other_total * share;
    maximum[r] = larger;
    return share;
  }

 private:
  static CODIR_FAST_DEVICE int column(int i) {
    return 8 * (i / 4) + 2 * (thread_index() % 4) + i % 2;
  }

  // The logits of a tile, -inf where a row is no negative.
  template <int N>
  CODIR_FAST_DEVICE void mask(float (&logits)[N], int first_row, std::uint32_t columns) const {
#pragma unroll
    for (int pair = 0; pair < N / 4; ++pair) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (kWeighing == Weighing::kNce && c == 0 && pair % 8 == 7) sync_warp();
        const int i = 4 * pair + c;
        const Word4 said = load_shared(columns + column(i) * kColumnBytes);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float logit = logits[i + 2 * r] * factor + float_of(said.z);
          // One comparison chain, no branch: a product is under way.
          const bool out = ((said.x == label_low[r]) & (said.y == label_high[r])) |
                           (excluded[r] - first_row == 8 * pair + c);
          logits[i + 2 * r] = out ? kMinusInfinity : logit;
        }
      }
    }
  }

  template <int N>
  static CODIR_FAST_DEVICE void find_largest(const float (&logits)[N], float (&largest)[2]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int r = i / 2 % 2;
      largest[r] = largest[r] < logits[i] ? logits[i] : largest[r];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int lanes = 1; lanes <= 2; lanes *= 2) {
        const float other = shuffle_xor(largest[r], lanes);
        largest[r] = largest[r] < other ? other : largest[r];
      }
    }
  }

  CODIR_FAST_DEVICE void follow_maximum(const float (&largest)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool grows = largest[r] > maximum[r] + kSlack;
      const float now = grows ? largest[r] : maximum[r];
      // Nothing allowed yet: the sums are 0, and so is their factor.
      scale[r] = grows ? exp2_approx(maximum[r] - now) : 1.0f;
      maximum[r] = now;
      total[r] *= scale[r];
      lost[r] *= scale[r];
    }
  }

  CODIR_FAST_DEVICE float infonce(float& logit, int r) const {
    if (kWeighing == Weighing::kFixedShift) {
      logit = exp2_approx(logit * factor - factor);
    } else {
      const float base = maximum[r] == kMinusInfinity ? 0.0f : maximum[r];
      logit = exp2_approx(logit - base);
    }
    return logit;
  }

  // sigmoid(a) in place of the logit, a = logit - offset; softplus(a) + extra, 0 for a masked row.
  CODIR_FAST_DEVICE float nce(float& logit) const {
    const float a = logit - offset;
    const float small = exp2_approx(-kLog2E * (a < 0 ? -a : a));
    // log(1 + x) = 2 artanh(x / (2 + x)), as a series: precise for the smallest x.
    const float u = small * reciprocal_approx(2.0f + small), v = u * u;
    float series = 1.0f / 13;
    series = series * v + 1.0f / 11;
    series = series * v + 1.0f / 9;
    series = series * v + 1.0f / 7;
    series = series * v + 1.0f / 5;
    series = series * v + 1.0f / 3;
    series = series * v + 1.0f;
    const float softplus = (a > 0 ? a : 0.0f) + 2 * u * series;
    const float term = logit == kMinusInfinity ? 0.0f : softplus + extra;
    logit = (a > 0 ? 1.0f : small) * reciprocal_approx(1.0f + small);
    return term;
  }

  // Kahan's sum: a plain one would wear off the last digits over thousands of tiles.
  CODIR_FAST_DEVICE void add(int r, float added) {
    const float increment = added - lost[r];
    const float sum = total[r] + increment;
    lost[r] = (sum - total[r]) - increment;
    total[r] = sum;
  }
};

}  // namespace sm90
}  // namespace codir_fast
