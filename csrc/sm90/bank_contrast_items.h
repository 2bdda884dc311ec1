// What the consumers of a pass of bank_contrast, narrow and wide, do alike: which items of the
// block come, and where sums go.
#pragma once

#include <cstdint>

#include "sm90/bank_contrast_producer.h"
#include "sm90/device.h"
#include "sm90/weighing.h"

namespace codir_fast {
namespace sm90 {

// Of the two rows of a product that a thread of a warpgroup holds, the first; the other is 8
// further (see wgmma.h).
CODIR_FAST_DEVICE int first_row_of_thread() {
  return thread_index() % kWarpgroup / 32 * 16 + thread_index() % 32 / 4;
}

// The items of the block, one after the other, for consumers: sigmoids leave no register for the
// number of items so far, nor for where it is kept, in shared memory for each warp.
template <typename Config>
struct ItemsOfBlock {
  Shared<Config> shared;
  const PassArguments& a;

  CODIR_FAST_DEVICE bool has(int round) const { return number(round) < a.plan.num_items; }
  CODIR_FAST_DEVICE Item begin(int round) const {
    sync_warp();  // all its threads have read the number before
    store_shared_word(kept(), round);
    return item_at(a.plan, number(round));
  }
  CODIR_FAST_DEVICE Item again() const { return item_at(a.plan, number(load_shared_word(kept()))); }
  CODIR_FAST_DEVICE int next_round() const { return load_shared_word(kept()) + 1; }

 private:
  CODIR_FAST_DEVICE int number(int round) const { return block_index() + round * num_blocks(); }
  CODIR_FAST_DEVICE std::uint32_t kept() const {
    return shared.items(forget(thread_index()) / 32 - kWarpgroup / 32);
  }
};

// What a thread has summed for queries `first_query` and 8 further, in columns from `first_column`
// on; maxima and totals where `with_totals`.
template <typename Config, int N>
CODIR_FAST_DEVICE void store_sums(const PassArguments& a, int split, int first_query,
                                  int first_column, const float (&rows)[N],
                                  const Weigher<Config::kWeighing>& weigher, bool with_totals) {
  const Plan& plan = a.plan;
  const float scale = Config::kScalesWeights ? 1 / kHalfWeightScale : 1.0f;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = first_query + 8 * r;
    if (query >= plan.B) continue;
    const std::int64_t at = std::int64_t{split} * plan.B + query;
    if (with_totals && thread_index() % 4 == 0) {
      a.maximum[at] = weigher.maximum[r];
      a.total[at] = weigher.total[r];
    }
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const int column = first_column + 8 * i + 2 * (thread_index() % 4);
      if (column >= plan.D) continue;
      store_pair(a.rows + at * plan.D + column, rows[4 * i + 2 * r] * scale,
                 rows[4 * i + 2 * r + 1] * scale);
    }
  }
}

}  // namespace sm90
}  // namespace codir_fast
