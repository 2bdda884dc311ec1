// One pass of bank_contrast over the bank on sm_90. A block keeps its queries in shared memory and
// walks over its part of the bank, which one warp brings in by the copy engine through a ring of
// tiles. Two or three consumer warpgroups, 64 queries each, multiply q.b, weigh the logits in
// registers and multiply the weights with the rows of the same tile; they take turns at the matrix
// units, so that one weighs while another multiplies. Over 256 columns two consumers share 64
// queries. Nothing of size B x K exists: what leaves are sums for each query and split of the bank,
// merged by bank_contrast_combine.h. All memory is the caller's.
#pragma once

#include <cstdint>
#include <type_traits>

#include "sm90/bank_contrast_consumer.h"
#include "sm90/bank_contrast_producer.h"
#include "sm90/bank_contrast_wide_consumer.h"

namespace codir_fast {
namespace sm90 {

template <typename Config, std::enable_if_t<!Config::kWide, int> = 0>
CODIR_FAST_DEVICE void consume(Shared<Config> shared, const PassArguments& a) {
  consume_narrow(shared, a);
}
template <typename Config, std::enable_if_t<Config::kWide, int> = 0>
CODIR_FAST_DEVICE void consume(Shared<Config> shared, const PassArguments& a) {
  if (thread_index() / kWarpgroup == 1)
    consume_wide<Config, 0>(shared, a);
  else
    consume_wide<Config, 1>(shared, a);
}

// Whether an item's sums, as the pass before left them, overflowed or vanished in some query.
template <typename Config>
CODIR_FAST_DEVICE bool has_bad_sums(const PassArguments& a, const Item& item) {
  bool bad = false;
  for (int r = thread_index(); r < a.plan.block_b; r += num_threads(Config::kTile)) {
    const int query = item.row_tile * a.plan.block_b + r;
    if (query >= a.plan.B) continue;
    const float total = a.total[std::int64_t{item.split} * a.plan.B + query];
    bad |= !(total >= kSmallestTotal && total < kLargestTotal);
  }
  return sync_block_or(bad);
}

// A block of num_threads(tile) threads. With `alternate` or `only_bad` there is a block for each
// item, else any number of blocks.
template <typename Config>
CODIR_FAST_DEVICE void bank_contrast_pass(const TensorMap& queries, const TensorMap& bank,
                                          const PassArguments& a, std::uint32_t shared_memory) {
  if (a.only_bad) {
    let_next_grid_begin();  // few items are bad: what comes next is there when all are looked at
    wait_for_previous_grid();
    if (!has_bad_sums<Config>(a, item_at(a.plan, block_index()))) return;
  }
  const Shared<Config> shared{shared_memory};
  if (thread_index() == 0) {
    prefetch_tensor_map(queries);
    prefetch_tensor_map(bank);
    init_barriers(shared, a.plan);
  }
  Config::kWide ? sync_cluster() : sync_block();
  if (thread_index() < kWarpgroup) {
    lower_registers<Config::kTile.producer_registers>();
    if (thread_index() == 0) copy_tiles(shared, queries, bank, a);
    if (Config::kMasked && thread_index() >= 32) describe_tiles(shared, a);
  } else {
    raise_registers<Config::kTile.consumer_registers>();
    consume(shared, a);
  }
  // Other blocks of the cluster may still copy to this one, and tell it what they have read.
  if (Config::kWide) sync_cluster();
}

}  // namespace sm90
}  // namespace codir_fast
