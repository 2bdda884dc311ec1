// The consumers of a pass of bank_contrast over more than 256 columns. Both have the block's 64
// queries, whose sums they divide by columns: each weighs one of a step's two tiles, leaves the
// weights in shared memory for the other one, and adds the rows of both tiles in its columns. Tiles
// come and go in halves of their columns, so that the copy engine is at work while the other half
// is still read.
#pragma once

#include <cstdint>

#include "sm90/bank_contrast_items.h"
#include "sm90/device.h"
#include "sm90/weighing.h"

namespace codir_fast {
namespace sm90 {

// What a consumer's thread holds of its item: two queries' parts. kMe: 0 or 1, the consumer; it has
// the kMe-th tile of a step and the kMe-th half of the columns.
template <typename Config, int kMe>
struct WideConsumer {
  using Element = typename Config::Element;
  static constexpr int kBlockK = Config::kBlockK;
  static constexpr int kStages = Config::kTile.stages;
  static constexpr int kColumns = Config::kD / 2;
  static constexpr int kOther = 1 - kMe;

  Shared<Config> shared;
  const PassArguments& a;
  Weigher<Config::kWeighing> weigher;
  float rows[kColumns / 2];
  std::uint32_t weights[kBlockK / 4];

  CODIR_FAST_DEVICE WideConsumer(Shared<Config> shared, const PassArguments& a)
      : shared(shared), a(a), weigher(a.inv_temperature, a.log_partition, a.log_noise, a.extra) {}

  static CODIR_FAST_DEVICE int thread() { return thread_index() % kWarpgroup; }

  // The first of this thread's two queries of the item, the other is 8 further.
  CODIR_FAST_DEVICE int first_query(const Item& item) const {
    return item.row_tile * a.plan.block_b + first_row_of_thread();
  }

  CODIR_FAST_DEVICE void wait_for_tile(int number) const {
    const RingPlace place = ring_place(number, kStages);
    barrier_wait(shared.full(2 * place.stage), place.phase);
    barrier_wait(shared.full(2 * place.stage + 1), place.phase);
    if (Config::kMasked) barrier_wait(shared.ready(place.stage), place.phase);
  }

  // This consumer's half of the tile, in every block that the tile was copied to. Whoever weighed
  // the tile has read all of it before its weights were there to be read.
  CODIR_FAST_DEVICE void release_half(int number) const {
    const int lane = thread() % 32;
    barrier_arrive_in_block(shared.empty(2 * (number % kStages) + kMe), lane,
                            lane < a.plan.cluster);
  }

  CODIR_FAST_DEVICE void start_logits(float (&logits)[kBlockK / 2], int number) const {
    const std::uint64_t queries = forget(along_rows(shared.queries(0)));
    const std::uint64_t tile = along_rows(shared.tile(number % kStages));
#pragma unroll
    for (int step = 0; step < Config::kD / kProductDepth; ++step) {
      Product<Element, kBlockK>::along_rows(logits, along_rows(queries, kConsumerRows, step),
                                            along_rows(tile, kBlockK, step), step > 0);
    }
    product_commit();
  }

  CODIR_FAST_DEVICE std::uint64_t my_columns(int number) const {
    return along_columns(shared.part(2 * (number % kStages) + kMe), kBlockK);
  }

  CODIR_FAST_DEVICE void start_rows_of_mine(int number) {
    const std::uint64_t tile = my_columns(number);
#pragma unroll
    for (int step = 0; step < kBlockK / kProductDepth; ++step) {
      Product<Element, kColumns>::along_columns(rows, weights + 4 * step,
                                                along_columns(tile, step));
    }
    product_commit();
  }

  CODIR_FAST_DEVICE void start_rows_of_other(int number) {
    const std::uint64_t tile = my_columns(number);
    const std::uint64_t theirs = along_rows(shared.weights(number % kStages));
#pragma unroll
    for (int step = 0; step < kBlockK / kProductDepth; ++step) {
      Product<Element, kColumns>::along_columns(rows, along_rows(theirs, kConsumerRows, step),
                                                along_columns(tile, step));
    }
    product_commit();
  }

  // Makes the largest logits of a step those of both tiles: sums of all columns go by one maximum.
  // The other one has read what is overwritten here: it left its weights after that.
  CODIR_FAST_DEVICE void agree(float (&largest)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (thread() % 4 == 0)
        store_shared_float(shared.exchange(kMe, first_row_of_thread() + 8 * r), largest[r]);
    }
    named_barrier_arrive(kFirstAgreed + kOther, 2 * kWarpgroup, true);
    named_barrier_sync(kFirstAgreed + kMe, 2 * kWarpgroup);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float other = load_shared_float(shared.exchange(kOther, first_row_of_thread() + 8 * r));
      largest[r] = largest[r] < other ? other : largest[r];
    }
  }

  // In registers for this consumer's product, and in shared memory, swizzled, for the other one's.
  CODIR_FAST_DEVICE void pack_weights(const float (&logits)[kBlockK / 2], int number) {
    const float scale = Config::kScalesWeights ? kHalfWeightScale : 1.0f;
    const std::uint32_t to =
        shared.weights(number % kStages) + first_row_of_thread() * kRowBytes + thread() % 4 * 4;
    // Worked out anew for each tile: what it is exchanged to would stay in registers.
    const int swizzle = forget(first_row_of_thread() % 8 * 16);
#pragma unroll
    for (int i = 0; i < kBlockK / 4; ++i) {
      weights[i] = pack<Element>(logits[2 * i] * scale, logits[2 * i + 1] * scale);
      store_shared_word(to + i % 2 * kSwizzleBytes + (i / 2 * 16 ^ swizzle), weights[i]);
    }
    publish_to_async_proxy();
  }

  // Sums over the item's tiles; `number` is that of its first tile in the ring. The consumers take
  // turns with the first product: while the second one's runs, the first one weighs.
  CODIR_FAST_DEVICE void scan(const Item& item, int number) {
    weigher.begin(a.labels, a.exclude_index, first_query(item), a.plan.B, a.plan.K);
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) rows[i] = 0;
    int row = step_row(a.plan, item, 0) + kMe * kBlockK;  // of the bank, where my tile begins
    for (const int end = number + 2 * item.num_steps; number < end; number += 2) {
      const int mine = number + kMe, other = number + kOther;
      float logits[kBlockK / 2];
      wait_for_tile(mine);
      named_barrier_sync(kFirstTurn + kMe, 2 * kWarpgroup);
      product_fence();
      start_logits(logits, mine);
      named_barrier_arrive(kFirstTurn + kOther, 2 * kWarpgroup, true);
      product_wait<0>();
      if (!Config::kMasked && row + kBlockK > item.end_row) weigher.cut(logits, item.end_row - row);
      weigher.weigh(logits, row, shared.columns(mine % kStages),
                    [&](float (&largest)[2]) { agree(largest); });
      row -= a.plan.block_k;
      weigher.rescale(rows);
      pack_weights(logits, mine);
      // The second consumer goes by the first one's barrier before the first one can come to it
      // again.
      if (kMe == 1) named_barrier_sync(kFirstWeights, 2 * kWarpgroup);
      named_barrier_arrive(kFirstWeights + kMe, 2 * kWarpgroup, true);
      product_fence();
      // The step's first tile first: its place is wanted first. Whoever weighed the other tile has
      // seen it come in, and its rows that are not valid turn to 0.
      if (kMe == 0) start_rows_of_mine(mine);
      if (kMe == 0) named_barrier_sync(kFirstWeights + 1, 2 * kWarpgroup);
      start_rows_of_other(other);
      if (kMe == 1) start_rows_of_mine(mine);
      product_wait<1>();
      release_half(number);
      product_wait<0>();
      release_half(number + 1);
    }
  }

  // Adds the second consumer's finished totals to the first one's.
  CODIR_FAST_DEVICE void merge() {
    if (kMe == 1) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        store_shared_float(shared.exchange(1, first_row_of_thread() + 8 * r), weigher.total[r]);
      named_barrier_arrive(kAllConsumers, 2 * kWarpgroup, true);
      return;
    }
    named_barrier_sync(kAllConsumers, 2 * kWarpgroup);
#pragma unroll
    for (int r = 0; r < 2; ++r)
      weigher.total[r] += load_shared_float(shared.exchange(1, first_row_of_thread() + 8 * r));
  }

  CODIR_FAST_DEVICE void store(const Item& item) const {
    store_sums<Config>(a, item.split, first_query(item), kMe * kColumns, rows, weigher, kMe == 0);
  }
};

template <typename Config, int kMe>
CODIR_FAST_DEVICE void consume_wide(Shared<Config> shared, const PassArguments& a) {
  WideConsumer<Config, kMe> consumer(shared, a);
  if (kMe == 1) named_barrier_arrive(kFirstTurn, 2 * kWarpgroup, true);
  int number = 0;
  const ItemsOfBlock<Config> items{shared, a};
  for (int round = 0; items.has(round); round = items.next_round()) {
    const Item item = items.begin(round);
    barrier_wait(shared.queries_full(), round & 1);
    consumer.scan(item, number);
    if (consumer.thread() % 32 == 0) barrier_arrive(shared.queries_empty());
    number += 2 * item.num_steps;
    let_next_grid_begin();
    consumer.weigher.finish();
    consumer.merge();
    consumer.store(items.again());
  }
  // Nobody is left waiting at a barrier when the block ends.
  if (kMe == 0) named_barrier_sync(kFirstTurn, 2 * kWarpgroup);
}

}  // namespace sm90
}  // namespace codir_fast
