// The consumers of a pass of bank_contrast up to 256 columns: warpgroups of 64 queries, each of
// which multiplies, weighs and sums by itself.
#pragma once

#include <cstdint>

#include "sm90/bank_contrast_items.h"
#include "sm90/device.h"
#include "sm90/weighing.h"

namespace codir_fast {
namespace sm90 {

// What a consumer's thread holds of its item: two queries' parts.
template <typename Config>
struct Consumer {
  static constexpr int kBlockK = Config::kBlockK;
  static constexpr int kStages = Config::kTile.stages;
  static constexpr int kConsumers = Config::kTile.consumers;
  // Of a barrier's phases only the parity is known: who leaves one out may take an earlier phase
  // for the one that is waited for. So consumers that take tiles in turn have stages of their own.
  static_assert(kStages % kConsumers == 0, "each stage is one consumer's, whoever takes turns");

  Shared<Config> shared;
  const PassArguments& a;
  Weigher<Config::kWeighing> weigher;
  float rows[Config::kD / 2];
  std::uint32_t weights[kBlockK / 4];

  CODIR_FAST_DEVICE Consumer(Shared<Config> shared, const PassArguments& a)
      : shared(shared), a(a), weigher(a.inv_temperature, a.log_partition, a.log_noise, a.extra) {}

  // Of the consumers; the thread is counted within its warpgroup.
  static CODIR_FAST_DEVICE int warpgroup() { return thread_index() / kWarpgroup - 1; }
  static CODIR_FAST_DEVICE int thread() { return thread_index() % kWarpgroup; }

  // The first of this thread's two queries of the item, the other is 8 further.
  CODIR_FAST_DEVICE int first_query(const Item& item) const {
    return item.row_tile * a.plan.block_b + (a.plan.alternate ? 0 : warpgroup() * kConsumerRows) +
           first_row_of_thread();
  }

  CODIR_FAST_DEVICE void wait_for_tile(int number) const {
    const RingPlace place = ring_place(number, kStages);
    barrier_wait(shared.full(place.stage), place.phase);
    if (Config::kMasked) barrier_wait(shared.ready(place.stage), place.phase);
  }

  CODIR_FAST_DEVICE void release_tile(int number) const {
    if (thread() % 32 == 0) barrier_arrive(shared.empty(number % kStages));
  }

  CODIR_FAST_DEVICE void start_logits(float (&logits)[kBlockK / 2], int number) const {
    // Computed anew for each tile: kept in registers, the descriptors of all steps would not fit.
    const std::uint64_t queries =
        forget(along_rows(shared.queries(a.plan.alternate ? 0 : warpgroup())));
    const std::uint64_t tile = along_rows(shared.tile(number % kStages));
#pragma unroll
    for (int step = 0; step < Config::kD / kProductDepth; ++step) {
      Product<typename Config::Element, kBlockK>::along_rows(
          logits, along_rows(queries, kConsumerRows, step), along_rows(tile, kBlockK, step),
          step > 0);
    }
    product_commit();
  }

  CODIR_FAST_DEVICE void start_rows(int number) {
    const std::uint64_t tile = along_columns(shared.tile(number % kStages), kBlockK);
#pragma unroll
    for (int step = 0; step < kBlockK / kProductDepth; ++step) {
      Product<typename Config::Element, Config::kD>::along_columns(rows, weights + 4 * step,
                                                                   along_columns(tile, step));
    }
    product_commit();
  }

  CODIR_FAST_DEVICE void weigh(float (&logits)[kBlockK / 2], int first_row, int number) {
    weigher.weigh(logits, first_row, shared.columns(number % kStages), [](float (&)[2]) {});
  }

  // Only once the product before has read the weights and added to the rows.
  CODIR_FAST_DEVICE void pack_weights(const float (&logits)[kBlockK / 2]) {
    weigher.rescale(rows);
    const float scale = Config::kScalesWeights ? kHalfWeightScale : 1.0f;
#pragma unroll
    for (int i = 0; i < kBlockK / 4; ++i) {
      weights[i] = pack<typename Config::Element>(logits[2 * i] * scale, logits[2 * i + 1] * scale);
    }
  }

  CODIR_FAST_DEVICE void take_turn() const {
    if (!a.plan.alternate) named_barrier_sync(kFirstTurn + warpgroup(), 2 * kWarpgroup);
  }
  CODIR_FAST_DEVICE void pass_turn() const {
    const int next = warpgroup() + 1 == kConsumers ? 0 : warpgroup() + 1;
    named_barrier_arrive(kFirstTurn + next, 2 * kWarpgroup, !a.plan.alternate);
  }

  // Sums over the item's tiles (of those every `step`-th, from `first`); `number` is that of the
  // item's first tile in the ring. The logits of a tile are multiplied while the weights of the one
  // before are.
  CODIR_FAST_DEVICE void scan(const Item& item, int number, int first, int step) {
    weigher.begin(a.labels, a.exclude_index, first_query(item), a.plan.B, a.plan.K);
#pragma unroll
    for (int i = 0; i < Config::kD / 2; ++i) rows[i] = 0;
    if (first >= item.num_steps) return;
    float logits[kBlockK / 2];
    wait_for_tile(number + first);
    product_fence();
    start_logits(logits, number + first);
    product_wait<0>();
    const int first_row = step_row(a.plan, item, first);
    if (!Config::kMasked) weigher.cut(logits, item.end_row - first_row);
    weigh(logits, first_row, number + first);
    pack_weights(logits);
    int n = first;
    // Few queries wait for the bank, not for the matrix unit: a tile is given back before the next
    // one is waited for.
    for (; a.plan.alternate && n + step < item.num_steps; n += step) {
      product_fence();
      start_rows(number + n);
      product_wait<0>();
      release_tile(number + n);
      wait_for_tile(number + n + step);
      product_fence();
      start_logits(logits, number + n + step);
      product_wait<0>();
      weigh(logits, step_row(a.plan, item, n + step), number + n + step);
      pack_weights(logits);
    }
    for (; n + step < item.num_steps; n += step) {
      wait_for_tile(number + n + step);
      take_turn();
      product_fence();
      start_logits(logits, number + n + step);
      start_rows(number + n);
      pass_turn();
      // Sigmoids need the registers that weights of a product under way would hold.
      product_wait<Config::kWeighing == Weighing::kNce ? 0 : 1>();
      weigh(logits, step_row(a.plan, item, n + step), number + n + step);
      product_wait<0>();
      release_tile(number + n);
      pack_weights(logits);
    }
    product_fence();
    start_rows(number + n);
    product_wait<0>();
    release_tile(number + n);
  }

  // Adds the other consumers' sums of the same queries to the first one's, through the memory of
  // the tiles, which nobody needs any more.
  CODIR_FAST_DEVICE void merge() {
    constexpr int kValues = Config::kD / 2 + 4;
    const auto place = [&](int other, int value) {
      return shared.tile(0) + 4 * (((other - 1) * kValues + value) * kWarpgroup + thread());
    };
    static_assert(
        4 * (kConsumers - 1) * kValues * kWarpgroup <= kStages * Config::kLayout.tile_bytes,
        "sums fit into the ring");
    named_barrier_sync(kAllConsumers, kConsumers * kWarpgroup);
    if (warpgroup() > 0) {
#pragma unroll
      for (int i = 0; i < Config::kD / 2; ++i) store_shared_float(place(warpgroup(), i), rows[i]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        store_shared_float(place(warpgroup(), Config::kD / 2 + r), weigher.maximum[r]);
        store_shared_float(place(warpgroup(), Config::kD / 2 + 2 + r), weigher.total[r]);
      }
    }
    named_barrier_sync(kAllConsumers, kConsumers * kWarpgroup);
    if (warpgroup() > 0) return;
    for (int other = 1; other < kConsumers; ++other) {
      float share[2];
      for (int r = 0; r < 2; ++r) {
        share[r] = weigher.merge(r, load_shared_float(place(other, Config::kD / 2 + r)),
                                 load_shared_float(place(other, Config::kD / 2 + 2 + r)));
      }
      weigher.rescale(rows);
#pragma unroll
      for (int i = 0; i < Config::kD / 2; ++i)
        rows[i] += share[i / 2 % 2] * load_shared_float(place(other, i));
    }
  }

  CODIR_FAST_DEVICE void store(const Item& item) const {
    store_sums<Config>(a, item.split, first_query(item), 0, rows, weigher, true);
  }
};

template <typename Config>
CODIR_FAST_DEVICE void consume_narrow(Shared<Config> shared, const PassArguments& a) {
  Consumer<Config> consumer(shared, a);
  constexpr int kConsumers = Config::kTile.consumers;
  const bool alternate = a.plan.alternate;
  // Whose turn is first.
  if (consumer.warpgroup() == kConsumers - 1)
    named_barrier_arrive(kFirstTurn, 2 * kWarpgroup, !alternate);
  int number = 0;
  const ItemsOfBlock<Config> items{shared, a};
  for (int round = 0; items.has(round); round = items.next_round()) {
    const Item item = items.begin(round);
    barrier_wait(shared.queries_full(), round & 1);
    consumer.scan(item, number, alternate ? consumer.warpgroup() : 0, alternate ? kConsumers : 1);
    if (consumer.thread() % 32 == 0) barrier_arrive(shared.queries_empty());
    number += item.num_steps;
    let_next_grid_begin();
    consumer.weigher.finish();
    if (alternate) consumer.merge();
    if (!alternate || consumer.warpgroup() == 0) consumer.store(items.again());
  }
  // Nobody is left waiting at a barrier when the block ends.
  if (consumer.warpgroup() == 0) consumer.take_turn();
}

}  // namespace sm90
}  // namespace codir_fast
