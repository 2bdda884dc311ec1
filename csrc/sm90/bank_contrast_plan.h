// How bank_contrast is cut for sm_90: tiles by width, where they lie in shared memory, and which
// block of threads takes which queries and which part of the bank. Plain arithmetic, for host and
// device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sm90/tile_layout.h"

namespace codir_fast {
namespace sm90 {

constexpr int kMaxDim = 512;
constexpr int kWarpgroup = 128;    // threads
constexpr int kConsumerRows = 64;  // queries that one consumer warpgroup multiplies
constexpr int kColumnBytes = 16;   // what a masked pass keeps of a bank row

// Of one width: rows of a bank tile, tiles in flight, consumer warpgroups, and the registers of a
// producer's and a consumer's thread, which fill the multiprocessor's 64 K together. A step of the
// pass is a tile.
struct PassTile {
  int block_k, stages, consumers, producer_registers, consumer_registers;
};

CODIR_FAST_HOST_DEVICE constexpr int padded_dim(int D) {
  return D <= 64 ? 64 : D <= 128 ? 128 : D <= 256 ? 256 : D <= 384 ? 384 : 512;
}

// Sums of so many columns don't fit the registers of one consumer: the two of a block have the same
// queries and half of the columns each. A step is two tiles then, and each consumer weighs one for
// both.
CODIR_FAST_HOST_DEVICE constexpr bool is_wide(int padded_dim) { return padded_dim > 256; }

// Tiles of a step, and the parts of columns in which a tile comes in and is given back.
CODIR_FAST_HOST_DEVICE constexpr int num_parts(int padded_dim) {
  return is_wide(padded_dim) ? 2 : 1;
}

// How logits become weights. kFixedShift: e^{s - 1/t}, without masks, right for unit rows and 1/t
// up to kMaxFixedShift; whoever launches it launches kRunningMaximum with `only_bad` after it.
// kRunningMaximum: any logits, and masks. kNce: sigmoids, and masks.
enum class Weighing { kFixedShift, kRunningMaximum, kNce };

// The largest tiles that registers hold. At 64 columns exponentials cost as much as products: a
// third consumer hides them, where masks leave registers for it. Threads that describe a masked
// pass's columns need more than one that copies.
CODIR_FAST_HOST_DEVICE constexpr PassTile pass_tile(int padded_dim, Weighing weighing) {
  if (is_wide(padded_dim)) {
    const int stages = padded_dim == 384 ? 3 : 2;
    return PassTile{64, stages, 2, 40, 232};
  }
  if (weighing == Weighing::kFixedShift) {
    return padded_dim == 64    ? PassTile{128, 9, 3, 32, 160}
           : padded_dim == 128 ? PassTile{176, 4, 2, 24, 240}
                               : PassTile{80, 4, 2, 24, 240};
  }
  return padded_dim == 64    ? PassTile{128, 8, 2, 40, 232}
         : padded_dim == 128 ? PassTile{112, 6, 2, 40, 232}
                             : PassTile{64, 4, 2, 40, 232};
}

CODIR_FAST_HOST_DEVICE constexpr int num_threads(PassTile tile) {
  return kWarpgroup * (1 + tile.consumers);
}

// Offsets in bytes from the beginning of shared memory, which is a multiple of 1024.
struct SharedLayout {
  int query_bytes, tile_bytes, weight_bytes;  // of one consumer's queries, of one bank tile
  int queries, tiles, weights, columns, exchange, items, barriers, bytes;
};

// Weights and exchange are of wide rows: a tile's weights for the other consumer, as a panel; a
// number of each query from each consumer (see WideConsumer). Items: see ItemsOfBlock. Barriers of
// 8 bytes, in this order: full for each part of a stage, ready for each stage, empty for each part,
// queries full and empty.
CODIR_FAST_HOST_DEVICE constexpr SharedLayout shared_layout(int padded_dim, Weighing weighing) {
  const PassTile tile = pass_tile(padded_dim, weighing);
  SharedLayout at{};
  at.query_bytes = kConsumerRows * padded_dim * 2;
  at.tile_bytes = tile.block_k * padded_dim * 2;
  at.weight_bytes = is_wide(padded_dim) ? panel_bytes(kConsumerRows) : 0;
  at.queries = 0;
  at.tiles = at.queries + (is_wide(padded_dim) ? 1 : tile.consumers) * at.query_bytes;
  at.weights = at.tiles + tile.stages * at.tile_bytes;
  at.columns = at.weights + tile.stages * at.weight_bytes;
  const bool masked = weighing != Weighing::kFixedShift;
  at.exchange = at.columns + (masked ? tile.stages * tile.block_k * kColumnBytes : 0);
  at.items = at.exchange + (is_wide(padded_dim) ? tile.consumers * kConsumerRows * 4 : 0);
  at.barriers = at.items + (tile.consumers * (kWarpgroup / 32) * 4 + 7) / 8 * 8;
  at.bytes = at.barriers + ((2 * num_parts(padded_dim) + 1) * tile.stages + 2) * 8;
  return at;
}

// Items are split-major: item = split * row_tiles + row tile, so that blocks that run side by side
// read the same part of the bank, which L2 then holds. With `alternate` the consumers of a block
// hold the same queries and take its bank tiles in turn: few queries, all threads busy. Blocks of a
// cluster, 1 or 2, have items that follow one another: other queries, the same part of the bank,
// which each of them brings a share of to all.
struct Plan {
  int B, K, D;
  bool alternate;
  int cluster;
  int block_b, block_k;  // queries of a block, bank rows of a step
  int row_tiles, splits, rows_per_split, num_items;
};

constexpr std::int64_t kMaxPartialBytes = 24 << 20;

inline std::int64_t partial_bytes(std::int64_t splits, std::int64_t B, std::int64_t D) {
  return splits * B * (D + 2) * 4;
}

inline Plan plan_tiles(int B, int K, int D, Weighing weighing) {
  const int dim = padded_dim(D);
  const PassTile tile = pass_tile(dim, weighing);
  const bool alternate = B <= kConsumerRows && !is_wide(dim);
  const int block_b = alternate || is_wide(dim) ? kConsumerRows : kConsumerRows * tile.consumers;
  const int block_k = num_parts(dim) * tile.block_k;
  return {B, K, D, alternate, 1, block_b, block_k, ceil_div(B, block_b), 0, 0, 0};
}

// Rows of a box of the bank: a block's share of a tile.
inline int box_rows(const Plan& plan) {
  return plan.block_k / num_parts(padded_dim(plan.D)) / plan.cluster;
}

// Blocks of a cluster, where there are clusters.
constexpr int kCluster = 2;

// Up to so many row tiles, another one without queries costs more than a cluster gains.
constexpr int kFewRowTiles = 8;

// The fewest splits that keep the multiprocessors as busy as any number does, within 2 %, as long
// as partial sums stay below kMaxPartialBytes.
inline Plan make_plan(int B, int K, int D, Weighing weighing, int num_multiprocessors) {
  Plan plan = plan_tiles(B, K, D, weighing);
  // 64 queries alone ask much of L2: a tile of wide rows for few products.
  const bool shares = is_wide(padded_dim(D)) && num_multiprocessors > 1 && plan.row_tiles > 1;
  if (shares && (plan.row_tiles % kCluster == 0 || plan.row_tiles > kFewRowTiles)) {
    plan.cluster = kCluster;
    plan.row_tiles += plan.row_tiles % kCluster;
  }
  const int bank_steps = ceil_div(K, plan.block_k);
  if (bank_steps == 0) return plan;
  const auto steps_taken = [&](int splits) {  // one after the other, by the busiest multiprocessor
    const std::int64_t items = std::int64_t{plan.row_tiles} * splits;
    return double(ceil_div(items, num_multiprocessors)) * ceil_div(bank_steps, splits);
  };
  // Consumers that take turns work on one item only (see Consumer::merge).
  const int most =
      std::min(bank_steps, plan.alternate ? num_multiprocessors : 8 * num_multiprocessors);
  int best = 1;
  for (int splits = 2; splits <= most; ++splits) {
    if (partial_bytes(splits, B, D) > kMaxPartialBytes) break;
    if (steps_taken(splits) * 1.02 < steps_taken(best)) best = splits;
  }
  plan.rows_per_split = ceil_div(bank_steps, best) * plan.block_k;
  plan.splits = ceil_div(K, plan.rows_per_split);
  plan.num_items = plan.row_tiles * plan.splits;
  return plan;
}

// A plan for the tiles of another weighing that leaves its sums where those of `plan` lie; without
// clusters.
inline Plan with_same_splits(const Plan& plan, Weighing weighing) {
  Plan other = plan_tiles(plan.B, plan.K, plan.D, weighing);
  other.splits = plan.splits, other.rows_per_split = plan.rows_per_split;
  other.num_items = other.row_tiles * other.splits;
  return other;
}

struct Item {
  int row_tile, split;
  int first_row, end_row, num_steps;  // of the bank
};

CODIR_FAST_HOST_DEVICE inline Item item_at(const Plan& plan, int number) {
  Item item{};
  item.split = number / plan.row_tiles;
  item.row_tile = number % plan.row_tiles;
  item.first_row = item.split * plan.rows_per_split;
  const int left = plan.K - item.first_row;
  const int rows = left < plan.rows_per_split ? left : plan.rows_per_split;
  item.end_row = item.first_row + rows;
  item.num_steps = ceil_div(rows, plan.block_k);
  return item;
}

// Bank row at which the n-th step begins. Steps go from the last rows to the first: those that the
// end cuts come first, before the loop, where a branch costs nothing.
CODIR_FAST_HOST_DEVICE inline int step_row(const Plan& plan, const Item& item, int n) {
  return item.first_row + (item.num_steps - 1 - n) * plan.block_k;
}

// Place in a ring of stages: tile n of a block lies in stage n % stages and is the phase-th there.
struct RingPlace {
  int stage, phase;
};

CODIR_FAST_HOST_DEVICE inline RingPlace ring_place(int n, int stages) {
  return {n % stages, (n / stages) & 1};
}

// What a tensor map says of a (rows, D) matrix of 16-bit elements: the copy engine's box is 64
// columns wide, columns and rows outside of the matrix come as zeros.
struct MatrixMap {
  const void* data;
  std::int64_t rows, columns, row_bytes;
  int box_rows, box_columns;
};

inline MatrixMap matrix_map(const void* data, std::int64_t rows, std::int64_t D, int box_rows) {
  return {data, rows, D, D * 2, box_rows, kPanelColumns};
}

// Rows of a bank, or queries: numbers of rows in a tile past the end still fit 32 bits.
constexpr std::int64_t kMaxRows = (std::int64_t{1} << 31) - 256;

// Why the copy engine can't read a bank that lies so; null if it can.
inline const char* why_not_mapped(const MatrixMap& map) {
  if (map.row_bytes % 16 != 0) return "D must be a multiple of 8";
  if (reinterpret_cast<std::uintptr_t>(map.data) % 16 != 0)
    return "`bank` must begin at a multiple of 16 bytes";
  if (map.rows > kMaxRows) return "`bank` must have at most 2^31 - 256 rows";
  return nullptr;
}

}  // namespace sm90
}  // namespace codir_fast
