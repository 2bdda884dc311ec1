// One pass of bank_contrast over the bank on sm_90. A block keeps its queries in shared memory and
// walks over its part of the bank, which one warp brings in by the copy engine through a ring of
// tiles. Two or three consumer warpgroups, 64 queries each, multiply q.b, weigh the logits in
// registers and multiply the weights with the rows of the same tile; they take turns at the matrix
// units, so that one weighs while another multiplies. Nothing of size B x K exists: what leaves are
// sums for each query and split of the bank, merged by bank_contrast_combine.h. All memory is the
// caller's.
#pragma once

#include <cstdint>
#include <type_traits>

#include "sm90/bank_contrast_plan.h"
#include "sm90/device.h"
#include "sm90/weighing.h"

namespace codir_fast {
namespace sm90 {

struct PassArguments {
  float* maximum;  // (splits, B), of InfoNCE's logits in units of log 2; 0 for NCE
  float* total;    // (splits, B), sum of 2^{logit - maximum}; NCE: of its terms
  float* rows;     // (splits, B, D), sum of 2^{logit - maximum} b; NCE: of sigmoid b
  // Null where not given, all of them with kFixedShift; see BankContrastInputs.
  const std::int64_t* labels;
  const std::int64_t* bank_labels;
  const std::int64_t* exclude_index;
  const bool* valid;
  Scalar inv_temperature, log_partition;
  float log_noise, extra;  // NCE: log(c + eps), log(1 + eps / c)
  Plan plan;
  bool only_bad;    // take up only items that have a query whose `total` overflowed or vanished
  bool reads_once;  // the bank: it need not stay in L2
};

template <typename Element_, int kD_, Weighing kWeighing_>
struct PassConfig {
  using Element = Element_;
  static constexpr int kD = kD_;
  static constexpr Weighing kWeighing = kWeighing_;
  static constexpr bool kMasked = kWeighing != Weighing::kFixedShift;
  static constexpr PassTile kTile = pass_tile(kD, kWeighing);
  static constexpr SharedLayout kLayout = shared_layout(kD, kWeighing);
  static constexpr int kBlockK = kTile.block_k;
  static constexpr int kPanels = kD / kPanelColumns;
  // Sigmoids would vanish in float16: they are scaled up before they are rounded.
  static constexpr bool kScalesWeights =
      kWeighing == Weighing::kNce && std::is_same<Element, Float16Element>::value;
};

// Addresses in shared memory.
template <typename Config>
struct Shared {
  std::uint32_t base;

  CODIR_FAST_DEVICE std::uint32_t queries(int warpgroup) const {
    return base + Config::kLayout.queries + warpgroup * Config::kLayout.query_bytes;
  }
  CODIR_FAST_DEVICE std::uint32_t tile(int stage) const {
    return base + Config::kLayout.tiles + stage * Config::kLayout.tile_bytes;
  }
  CODIR_FAST_DEVICE std::uint32_t columns(int stage) const {
    return base + Config::kLayout.columns + stage * Config::kBlockK * kColumnBytes;
  }
  // The copy engine has brought the tile; its columns are described (masked pass); it may be
  // overwritten.
  CODIR_FAST_DEVICE std::uint32_t full(int stage) const { return barrier(stage); }
  CODIR_FAST_DEVICE std::uint32_t ready(int stage) const {
    return barrier(Config::kTile.stages + stage);
  }
  CODIR_FAST_DEVICE std::uint32_t empty(int stage) const {
    return barrier(2 * Config::kTile.stages + stage);
  }
  CODIR_FAST_DEVICE std::uint32_t queries_full() const { return barrier(3 * Config::kTile.stages); }
  CODIR_FAST_DEVICE std::uint32_t queries_empty() const {
    return barrier(3 * Config::kTile.stages + 1);
  }
  CODIR_FAST_DEVICE std::uint32_t barrier(int n) const {
    return base + Config::kLayout.barriers + 8 * n;
  }
};

constexpr int kDescribers = kWarpgroup - 32;  // threads: all of the producer's but its first warp
// Named barriers: one for each consumer's turn, one for all consumers.
constexpr int kFirstTurn = 1, kAllConsumers = 4;

template <typename Config>
CODIR_FAST_DEVICE void init_barriers(Shared<Config> shared, bool alternate) {
  const int consumers = Config::kTile.consumers;
  for (int stage = 0; stage < Config::kTile.stages; ++stage) {
    barrier_init(shared.full(stage), 1);
    barrier_init(shared.ready(stage), kDescribers);
    barrier_init(shared.empty(stage), alternate ? 4 : 4 * consumers);  // a thread of each warp
  }
  barrier_init(shared.queries_full(), 1);
  barrier_init(shared.queries_empty(), 4 * consumers);
  publish_barriers();
}

// How many items the block took up before this one.
CODIR_FAST_DEVICE int round_of(int item) { return item / num_blocks(); }

// One thread: all copies of the block.
template <typename Config>
CODIR_FAST_DEVICE void copy_tiles(Shared<Config> shared, const TensorMap& queries,
                                  const TensorMap& bank, const PassArguments& a) {
  constexpr int kStages = Config::kTile.stages;
  int number = 0;  // tiles so far
  for (int at = block_index(); at < a.plan.num_items; at += num_blocks()) {
    const Item item = item_at(a.plan, at);
    // The queries may come from a kernel that still runs; tiles of the bank need not wait for it.
    const int ahead = (item.num_tiles < kStages ? item.num_tiles : kStages) - 1;
    for (int n = 0; n < item.num_tiles; ++n, ++number) {
      const RingPlace place = ring_place(number, kStages);
      barrier_wait(shared.empty(place.stage), place.phase ^ 1);
      barrier_expect(shared.full(place.stage), Config::kLayout.tile_bytes);
      for (int panel = 0; panel < Config::kPanels; ++panel) {
        copy_box(shared.tile(place.stage) + panel * panel_bytes(Config::kBlockK), bank,
                 tile_row(a.plan, item, n), panel * kPanelColumns, shared.full(place.stage),
                 a.reads_once ? kEvictFirst : kEvictNormal);
      }
      if (n != ahead) continue;
      const int warpgroups = a.plan.alternate ? 1 : Config::kTile.consumers;
      barrier_wait(shared.queries_empty(), (round_of(at) & 1) ^ 1);
      wait_for_previous_grid();
      barrier_expect(shared.queries_full(), warpgroups * Config::kLayout.query_bytes);
      for (int w = 0; w < warpgroups; ++w) {
        for (int panel = 0; panel < Config::kPanels; ++panel) {
          copy_box(shared.queries(w) + panel * panel_bytes(kConsumerRows), queries,
                   item.row_tile * a.plan.block_b + w * kConsumerRows, panel * kPanelColumns,
                   shared.queries_full(), kEvictNormal);
        }
      }
    }
  }
}

// Says of a bank row, where consumers read it, its label and 0 or -inf to add to its logits. `end`
// is where the item's rows end. Whether the row may hold anything.
CODIR_FAST_DEVICE bool describe_row(const PassArguments& a, int row, int end, std::uint32_t to) {
  const bool in_bank = row < a.plan.K;
  const bool invalid = in_bank && a.valid != nullptr && !a.valid[row];
  // Without labels those of queries are 0: no row has that.
  const std::uint64_t label = a.labels == nullptr ? 1
                              : in_bank           ? static_cast<std::uint64_t>(a.bank_labels[row])
                                                  : 0;
  store_shared(to, {static_cast<std::uint32_t>(label), static_cast<std::uint32_t>(label >> 32),
                    bits_of(row < end && !invalid ? 0.0f : kMinusInfinity), 0});
  return invalid;
}

// The threads beside the one that copies: describe the rows of each tile, and overwrite with zeros
// what may hold anything.
template <typename Config>
CODIR_FAST_DEVICE void describe_tiles(Shared<Config> shared, const PassArguments& a) {
  constexpr int kStages = Config::kTile.stages;
  int number = 0;
  for (int at = block_index(); at < a.plan.num_items; at += num_blocks()) {
    const Item item = item_at(a.plan, at);
    for (int n = 0; n < item.num_tiles; ++n, ++number) {
      const RingPlace place = ring_place(number, kStages);
      barrier_wait(shared.empty(place.stage), place.phase ^ 1);
      for (int j = thread_index() - 32; j < Config::kBlockK; j += kDescribers) {
        if (!describe_row(a, tile_row(a.plan, item, n) + j, item.end_row,
                          shared.columns(place.stage) + j * kColumnBytes))
          continue;
        barrier_wait(shared.full(place.stage), place.phase);
        for (int panel = 0; panel < Config::kPanels; ++panel) {
          const std::uint32_t row =
              shared.tile(place.stage) + panel * panel_bytes(Config::kBlockK) + j * kRowBytes;
          for (int byte = 0; byte < kRowBytes; byte += 16) store_shared(row + byte, {0, 0, 0, 0});
        }
        publish_to_async_proxy();
      }
      barrier_arrive(shared.ready(place.stage));
    }
  }
}

// What a consumer's thread holds of its item: two queries' parts.
template <typename Config>
struct Consumer {
  static constexpr int kBlockK = Config::kBlockK;
  static constexpr int kStages = Config::kTile.stages;
  static constexpr int kConsumers = Config::kTile.consumers;

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
           thread() / 32 * 16 + thread() % 32 / 4;
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
    weigher.weigh(logits, first_row, shared.columns(number % kStages));
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
    if (first >= item.num_tiles) return;
    float logits[kBlockK / 2];
    wait_for_tile(number + first);
    product_fence();
    start_logits(logits, number + first);
    product_wait<0>();
    const int first_row = tile_row(a.plan, item, first);
    if (!Config::kMasked) weigher.cut(logits, item.end_row - first_row);
    weigh(logits, first_row, number + first);
    pack_weights(logits);
    int n = first;
    for (; n + step < item.num_tiles; n += step) {
      wait_for_tile(number + n + step);
      take_turn();
      product_fence();
      start_logits(logits, number + n + step);
      start_rows(number + n);
      pass_turn();
      // Sigmoids need the registers that weights of a product under way would hold.
      product_wait<Config::kWeighing == Weighing::kNce ? 0 : 1>();
      weigh(logits, tile_row(a.plan, item, n + step), number + n + step);
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
    const Plan& plan = a.plan;
    const float scale = Config::kScalesWeights ? 1 / kHalfWeightScale : 1.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = first_query(item) + 8 * r;
      if (query >= plan.B) continue;
      const std::int64_t at = std::int64_t{item.split} * plan.B + query;
      if (thread() % 4 == 0) {
        a.maximum[at] = weigher.maximum[r];
        a.total[at] = weigher.total[r];
      }
#pragma unroll
      for (int i = 0; i < Config::kD / 8; ++i) {
        const int column = 8 * i + 2 * (thread() % 4);
        if (column >= plan.D) continue;
        store_pair(a.rows + at * plan.D + column, rows[4 * i + 2 * r] * scale,
                   rows[4 * i + 2 * r + 1] * scale);
      }
    }
  }
};

template <typename Config>
CODIR_FAST_DEVICE void consume(Shared<Config> shared, const PassArguments& a) {
  Consumer<Config> consumer(shared, a);
  constexpr int kConsumers = Config::kTile.consumers;
  const bool alternate = a.plan.alternate;
  // Whose turn is first.
  if (consumer.warpgroup() == kConsumers - 1)
    named_barrier_arrive(kFirstTurn, 2 * kWarpgroup, !alternate);
  int number = 0;
  for (int at = block_index(); at < a.plan.num_items; at += num_blocks()) {
    const Item item = item_at(a.plan, at);
    barrier_wait(shared.queries_full(), round_of(at) & 1);
    consumer.scan(item, number, alternate ? consumer.warpgroup() : 0, alternate ? kConsumers : 1);
    if (consumer.thread() % 32 == 0) barrier_arrive(shared.queries_empty());
    number += item.num_tiles;
    let_next_grid_begin();
    consumer.weigher.finish();
    if (alternate) consumer.merge();
    // The item is worked out again: it takes fewer registers than to keep it.
    if (!alternate || consumer.warpgroup() == 0) consumer.store(item_at(a.plan, forget(at)));
  }
  // Nobody is left waiting at a barrier when the block ends.
  if (consumer.warpgroup() == 0) consumer.take_turn();
}

// Whether an item's sums, as the pass before left them, overflowed or vanished in some query.
template <typename Config>
CODIR_FAST_DEVICE bool has_bad_sums(const PassArguments& a, const Item& item) {
  bool bad = false;
  for (int r = thread_index(); r < a.plan.block_b; r += num_threads(Config::kTile)) {
    const int query = item.row_tile * a.plan.block_b + r;
    if (query >= a.plan.B) continue;
    const float total = a.total[std::int64_t{item.split} * a.plan.B + query];
    bad |= !(total >= kSmallestTotal && total < -kMinusInfinity);
  }
  return sync_block_or(bad);
}

// A block of num_threads(tile) threads. With `alternate` or `only_bad` there is a block for each
// item, else any number of blocks.
template <typename Config>
CODIR_FAST_DEVICE void bank_contrast_pass(const TensorMap& queries, const TensorMap& bank,
                                          const PassArguments& a, std::uint32_t shared_memory) {
  if (a.only_bad) {
    wait_for_previous_grid();
    if (!has_bad_sums<Config>(a, item_at(a.plan, block_index()))) return;
  }
  const Shared<Config> shared{shared_memory};
  if (thread_index() == 0) {
    prefetch_tensor_map(queries);
    prefetch_tensor_map(bank);
    init_barriers(shared, a.plan.alternate);
  }
  sync_block();
  if (thread_index() < kWarpgroup) {
    lower_registers<Config::kTile.producer_registers>();
    if (thread_index() == 0) copy_tiles(shared, queries, bank, a);
    if (Config::kMasked && thread_index() >= 32) describe_tiles(shared, a);
  } else {
    raise_registers<Config::kTile.consumer_registers>();
    consume(shared, a);
  }
}

}  // namespace sm90
}  // namespace codir_fast
