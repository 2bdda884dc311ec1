// The tiles of a pass of bank_contrast: where they lie in a block's shared memory, and the
// warpgroup that brings them in. Its first thread starts the copies of queries and bank rows,
// through a ring; in a masked pass its other warps describe the bank rows to the consumers.
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
  static constexpr bool kWide = is_wide(kD);
  static constexpr int kParts = num_parts(kD);
  static constexpr int kPanels = kD / kPanelColumns;  // of a tile
  static constexpr int kPartPanels = kPanels / kParts;
  static constexpr int kSlots = kParts * kTile.stages;  // of parts of tiles, in the ring
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
  CODIR_FAST_DEVICE std::uint32_t part(int slot) const {
    return base + Config::kLayout.tiles + slot * (Config::kLayout.tile_bytes / Config::kParts);
  }
  CODIR_FAST_DEVICE std::uint32_t weights(int stage) const {
    return base + Config::kLayout.weights + stage * Config::kLayout.weight_bytes;
  }
  CODIR_FAST_DEVICE std::uint32_t columns(int stage) const {
    return base + Config::kLayout.columns + stage * Config::kBlockK * kColumnBytes;
  }
  CODIR_FAST_DEVICE std::uint32_t items(int warp) const {
    return base + Config::kLayout.items + 4 * warp;
  }
  CODIR_FAST_DEVICE std::uint32_t exchange(int consumer, int query) const {
    return base + Config::kLayout.exchange + 4 * (consumer * kConsumerRows + query);
  }
  // The copy engine has brought the part of a tile; the tile's rows are described (masked pass);
  // the part may be overwritten.
  CODIR_FAST_DEVICE std::uint32_t full(int slot) const { return barrier(slot); }
  CODIR_FAST_DEVICE std::uint32_t ready(int stage) const { return barrier(Config::kSlots + stage); }
  CODIR_FAST_DEVICE std::uint32_t empty(int slot) const {
    return barrier(Config::kSlots + Config::kTile.stages + slot);
  }
  CODIR_FAST_DEVICE std::uint32_t queries_full() const {
    return barrier(2 * Config::kSlots + Config::kTile.stages);
  }
  CODIR_FAST_DEVICE std::uint32_t queries_empty() const {
    return barrier(2 * Config::kSlots + Config::kTile.stages + 1);
  }
  CODIR_FAST_DEVICE std::uint32_t barrier(int n) const {
    return base + Config::kLayout.barriers + 8 * n;
  }
};

constexpr int kDescribers = kWarpgroup - 32;  // threads: all of the producer's but its first warp
// Named barriers: one for each consumer's turn, one for all consumers, one for the weights of each,
// one where each waits for the other's maximum.
constexpr int kFirstTurn = 1, kAllConsumers = 4, kFirstWeights = 5, kFirstAgreed = 7;

template <typename Config>
CODIR_FAST_DEVICE void init_barriers(Shared<Config> shared, const Plan& plan) {
  const int consumers = Config::kTile.consumers;
  // Consumers that give a part of a tile back: one where they take parts, or tiles, in turn; of
  // each block that a part is copied to.
  const int owners = Config::kWide ? plan.cluster : plan.alternate ? 1 : consumers;
  for (int slot = 0; slot < Config::kSlots; ++slot) {
    barrier_init(shared.full(slot), 1);
    barrier_init(shared.empty(slot), 4 * owners);  // a thread of each warp
  }
  for (int stage = 0; stage < Config::kTile.stages; ++stage)
    barrier_init(shared.ready(stage), kDescribers);
  barrier_init(shared.queries_full(), 1);
  barrier_init(shared.queries_empty(), 4 * consumers);
  publish_barriers();
}

// Bank row at which the n-th tile of an item begins.
template <typename Config>
CODIR_FAST_DEVICE int tile_row(const Plan& plan, const Item& item, int n) {
  return step_row(plan, item, n / Config::kParts) + n % Config::kParts * Config::kBlockK;
}

// A part of a tile, the `number`-th of the block, once its place is free; of blocks of a cluster
// each copies its share of the rows to all.
template <typename Config>
CODIR_FAST_DEVICE void copy_part(Shared<Config> shared, const TensorMap& bank,
                                 const PassArguments& a, int row, int number) {
  const RingPlace place = ring_place(number, Config::kSlots);
  const std::uint32_t full = shared.full(place.stage);
  const std::uint64_t policy = a.reads_once ? kEvictFirst : kEvictNormal;
  barrier_wait(shared.empty(place.stage), place.phase ^ 1);
  barrier_expect(full, Config::kPartPanels * panel_bytes(Config::kBlockK));
  for (int panel = 0; panel < Config::kPartPanels; ++panel) {
    const std::uint32_t to = shared.part(place.stage) + panel * panel_bytes(Config::kBlockK);
    const int column = (number % Config::kParts * Config::kPartPanels + panel) * kPanelColumns;
    if (Config::kWide && a.plan.cluster > 1) {
      // Not by a.plan.cluster: that would be a division for each box.
      const int first = block_of_cluster() * (Config::kBlockK / kCluster);
      copy_box_to_cluster(to + first * kRowBytes, bank, row + first, column, full,
                          (1 << kCluster) - 1, policy);
    } else {
      copy_box(to, bank, row, column, full, policy);
    }
  }
}

// One thread: all copies of the block.
template <typename Config>
CODIR_FAST_DEVICE void copy_tiles(Shared<Config> shared, const TensorMap& queries,
                                  const TensorMap& bank, const PassArguments& a) {
  constexpr int kStages = Config::kTile.stages;
  int number = 0, round = 0;  // parts of tiles, and items, so far
  for (int at = block_index(); at < a.plan.num_items; at += num_blocks(), ++round) {
    const Item item = item_at(a.plan, at);
    const int num_tiles = item.num_steps * Config::kParts;
    // The queries may come from a kernel that still runs; tiles of the bank need not wait for it.
    const int ahead = (num_tiles < kStages ? num_tiles : kStages) - 1;
    for (int n = 0; n < num_tiles; ++n) {
      const int row = tile_row<Config>(a.plan, item, n);
      for (int part = 0; part < Config::kParts; ++part) copy_part(shared, bank, a, row, number++);
      if (n != ahead) continue;
      const int warpgroups = Config::kWide || a.plan.alternate ? 1 : Config::kTile.consumers;
      barrier_wait(shared.queries_empty(), (round & 1) ^ 1);
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

// What is known of a bank row.
struct RowFacts {
  std::uint64_t label;
  bool invalid;
};

CODIR_FAST_DEVICE RowFacts row_facts(const PassArguments& a, int row) {
  const bool in_bank = row < a.plan.K;
  // Without labels those of queries are 0: no row has that.
  return {a.labels == nullptr ? 1
          : in_bank           ? static_cast<std::uint64_t>(a.bank_labels[row])
                              : 0,
          in_bank && a.valid != nullptr && !a.valid[row]};
}

// Says of a row, where consumers read it, its label and 0 or -inf to add to its logits.
CODIR_FAST_DEVICE void describe_row(const RowFacts& row, bool in_item, std::uint32_t to) {
  store_shared(to,
               {static_cast<std::uint32_t>(row.label), static_cast<std::uint32_t>(row.label >> 32),
                bits_of(in_item && !row.invalid ? 0.0f : kMinusInfinity), 0});
}

// The threads beside the one that copies: describe the rows of each tile, and overwrite with zeros
// what may hold anything.
template <typename Config>
CODIR_FAST_DEVICE void describe_tiles(Shared<Config> shared, const PassArguments& a) {
  constexpr int kStages = Config::kTile.stages;
  constexpr int kRows = ceil_div(Config::kBlockK, kDescribers);  // of a thread
  const int thread = thread_index() - 32;
  int number = 0;  // tiles so far
  for (int at = block_index(); at < a.plan.num_items; at += num_blocks()) {
    const Item item = item_at(a.plan, at);
    for (int n = 0; n < item.num_steps * Config::kParts; ++n, ++number) {
      const RingPlace place = ring_place(number, kStages);
      const int slot = Config::kParts * place.stage;
      const int first_row = tile_row<Config>(a.plan, item, n);
      // All at once and before the wait: global memory answers slowly.
      RowFacts facts[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int j = thread + r * kDescribers;
        facts[r] = row_facts(a, j < Config::kBlockK ? first_row + j : a.plan.K);
      }
      for (int part = 0; part < Config::kParts; ++part)
        barrier_wait(shared.empty(slot + part), place.phase ^ 1);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int j = thread + r * kDescribers;
        if (j >= Config::kBlockK) continue;
        describe_row(facts[r], first_row + j < item.end_row,
                     shared.columns(place.stage) + j * kColumnBytes);
        if (!facts[r].invalid) continue;
        for (int part = 0; part < Config::kParts; ++part)
          barrier_wait(shared.full(slot + part), place.phase);
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

}  // namespace sm90
}  // namespace codir_fast
