// The index of indexed_contrast in the order of the bank: cut into blocks of rows that a core's L2
// holds, so that a row which several queries name comes from memory once, in sequence, and not once
// per name, at random.
#pragma once

#include <algorithm>
#include <cstdint>

#include "contrast_cpu.h"
#include "indexed_contrast.h"
#include "indexed_contrast_cpu_impl.h"

namespace codir_fast {
namespace {

constexpr std::int64_t kBlockBytes = 1 << 18;  // L2 holds the block in use and the next
constexpr std::int64_t kMaxBlockBits = 16;     // a row's number in its block is 16 bits wide
constexpr std::int64_t kMaxPairs = 1 << 19;    // of a query and a row in a part: 1 MiB
constexpr std::int64_t kMaxQueries = 64;       // in a part
constexpr std::int64_t kMinCell = 8;           // rows of a block that a query names, on average

// The blocks are as large as fits, in rows of so many bytes.
inline std::int64_t block_bits(std::int64_t row_bytes) {
  std::int64_t bits = 0;
  while (bits < kMaxBlockBits && (row_bytes << (bits + 1)) <= kBlockBytes) ++bits;
  return bits;
}

// The index is put in order by parts: so many queries, so many positions of each.
struct Parts {
  std::int64_t queries, positions, block_bits;

  static Parts cut(const IndexedContrastInputs& inputs) {
    const BankContrastInputs& in = inputs.bank;
    const std::int64_t queries = ceil_div(in.B, ceil_div(in.B, kMaxQueries));
    return {queries, std::min(inputs.M, kMaxPairs / queries),
            codir_fast::block_bits(in.D * element_size(in.bank_dtype))};
  }

  // One part, for the gradient to the bank, which is summed in double beside the block.
  static Parts whole(const IndexedContrastInputs& inputs) {
    const BankContrastInputs& in = inputs.bank;
    const std::int64_t bytes = element_size(in.bank_dtype) + sizeof(double);
    return {in.B, inputs.M, codir_fast::block_bits(in.D * bytes)};
  }

  // Whether putting the index in order costs less than it saves: rows are named more than once, a
  // query's rows of a block fill vectors, and the bank is not in L2 anyway.
  bool pay(const BankContrastInputs& in) const {
    return queries * positions >= in.K && (positions << block_bits) >= kMinCell * in.K &&
           in.K * in.D * element_size(in.bank_dtype) > 4 * kBlockBytes;
  }
};

// A part of the index: per query its rows, block by block, and where each block's end.
class BlockOrder {
 public:
  const std::int64_t blocks;

  BlockOrder(const Parts& parts, const BankContrastInputs& in)
      : blocks(ceil_div(in.K, std::int64_t{1} << parts.block_bits)),
        in_(in),
        bits_(parts.block_bits),
        stride_(parts.positions),
        number_(allocate<std::uint16_t>(parts.queries * parts.positions)),
        ends_(allocate<std::uint32_t>(parts.queries * blocks)) {}

  bool allocated() const { return number_ && ends_; }
  std::int64_t block_rows() const { return std::int64_t{1} << bits_; }
  std::int64_t num_pairs() const { return num_queries_ * num_positions_; }

  Range rows(std::int64_t block) const {
    return {block << bits_, std::min((block + 1) << bits_, in_.K)};
  }

  void sort(const IndexedContrastInputs& inputs, const Range& queries, const Range& positions,
            const Executor& executor) {
    const std::int64_t threads = std::max(executor.num_threads, 1);
    num_queries_ = queries.end - queries.begin;
    num_positions_ = positions.end - positions.begin;
    executor.parallel_for(threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t thread = begin; thread < end; ++thread) {
        const Range own = share(num_queries_, threads, thread);
        for (std::int64_t n = own.begin; n < own.end; ++n) {
          sort_query(n, inputs.index + (queries.begin + n) * inputs.M + positions.begin);
        }
      }
    });
  }

  // Pairs of a query and a row of the block.
  std::int64_t size(std::int64_t block) const {
    std::int64_t size = 0;
    for (std::int64_t n = 0; n < num_queries_; ++n) {
      const Range named = cell(n, block);
      size += named.end - named.begin;
    }
    return size;
  }

  // The same of all blocks, (blocks,).
  void sizes(std::int64_t* sizes) const {
    std::fill_n(sizes, blocks, std::int64_t{0});
    for (std::int64_t n = 0; n < num_queries_; ++n) {
      for (std::int64_t block = 0; block < blocks; ++block) {
        const Range named = cell(n, block);
        sizes[block] += named.end - named.begin;
      }
    }
  }

  // Calls use(query, its rows, what to fetch meanwhile: the next block, unless hardly any row of it
  // is likely to be named) for the block's pairs,
  // query by query, from pairs.begin to pairs.end.
  template <typename Use>
  void visit(std::int64_t block, const Range& pairs, const Use& use) const {
    if (pairs.begin >= pairs.end) return;
    constexpr std::int64_t kLine = 64;
    const std::int64_t row_bytes = in_.D * element_size(in_.bank_dtype);
    const char* bank = static_cast<const char*>(in_.bank);
    Upcoming upcoming{nullptr, nullptr, 0};
    const Range next = rows(block + 1);
    if (2 * (pairs.end - pairs.begin) >= next.end - next.begin && next.begin < next.end) {
      upcoming.at = bank + next.begin * row_bytes;
      upcoming.end = bank + next.end * row_bytes;
      upcoming.lines_per_row =
          ceil_div(ceil_div(upcoming.end - upcoming.at, kLine), pairs.end - pairs.begin);
    }
    std::int64_t at = 0;
    for (std::int64_t n = 0; n < num_queries_ && at < pairs.end; ++n) {
      const Range named = cell(n, block);
      const std::int64_t size = named.end - named.begin;
      const std::int64_t begin = std::max(pairs.begin - at, std::int64_t{0});
      const std::int64_t end = std::min(pairs.end - at, size);
      at += size;
      if (begin >= end) continue;
      const std::uint16_t* number = number_.get() + n * stride_ + named.begin + begin;
      use(n, {number, rows(block).begin, end - begin}, upcoming);
    }
  }

 private:
  // Stable. A block's place in ends_ holds first how many rows it has, then where its next one
  // goes.
  void sort_query(std::int64_t n, const std::int64_t* index) const {
    const std::int64_t mask = block_rows() - 1;
    std::uint32_t* ends = ends_.get() + n * blocks;
    std::uint16_t* number = number_.get() + n * stride_;
    std::fill_n(ends, blocks, 0u);
    for (std::int64_t m = 0; m < num_positions_; ++m) ++ends[index[m] >> bits_];
    std::uint32_t sum = 0;
    for (std::int64_t block = 0; block < blocks; ++block) {
      const std::uint32_t size = ends[block];
      ends[block] = sum;
      sum += size;
    }
    for (std::int64_t m = 0; m < num_positions_; ++m) {
      number[ends[index[m] >> bits_]++] = static_cast<std::uint16_t>(index[m] & mask);
    }
  }

  Range cell(std::int64_t n, std::int64_t block) const {
    const std::uint32_t* ends = ends_.get() + n * blocks;
    return {block == 0 ? 0 : ends[block - 1], ends[block]};
  }

  const BankContrastInputs& in_;
  const std::int64_t bits_, stride_;
  std::int64_t num_queries_ = 0, num_positions_ = 0;
  const Buffer<std::uint16_t> number_;
  const Buffer<std::uint32_t> ends_;
};

}  // namespace
}  // namespace codir_fast
