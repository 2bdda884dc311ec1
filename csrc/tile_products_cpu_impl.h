// The two products of a pass by tiles, each a register tile of sums. Include only from files that
// are compiled once per instruction set.
#pragma once

#include <cstdint>

#include "simd/vec.h"

namespace codir_fast {
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

}  // namespace
}  // namespace codir_fast
