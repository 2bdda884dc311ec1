// The instructions of csrc/sm90/device.h on a host, so that the very source of a kernel runs
// without a GPU. Threads of a block are fibers, which a scheduler resumes in a random order; what
// the hardware does asynchronously happens as late as it may, or as early. Shared memory begins as
// NaN. A wait that nobody ends, a barrier used before it is initialised, threads of a warpgroup
// that disagree, an access outside of shared memory, or to that of a block of the cluster that has
// ended, ends the program with a message. So does a product before which its threads set no fence,
// or a product or copy that meets what a thread stored and has not published to the copy engine and
// the matrix unit.
//
// Modelled after the PTX ISA: mbarrier phases and transaction bytes, named barriers, 2-D tensor
// copies with the 128-byte swizzle, to one block or several of a cluster, wgmma's matrix
// descriptors and register layouts. Not modelled: memory ordering otherwise, launches that overlap,
// speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "sm90/bank_contrast_plan.h"
#include "storage.h"

#define CODIR_FAST_DEVICE inline

namespace codir_fast {
namespace sm90 {

using BFloat16Element = BFloat16;
using Float16Element = Float16;
using TensorMap = MatrixMap;
constexpr std::uint64_t kEvictNormal = 0, kEvictFirst = 1;

namespace emulator {

constexpr std::uint32_t kSharedBase = 1024;
constexpr std::size_t kStackBytes = 256 << 10;
constexpr int kWarpThreads = 32, kGroupThreads = 128;

[[noreturn]] inline void fail(const char* what) {
  std::printf("sm90 emulator: %s\n", what);
  std::exit(1);
}

struct ThreadCopy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  std::vector<std::vector<ThreadCopy>> copy_groups{1};  // the last one is still open
  ucontext_t context;
  std::function<bool()> may_go;  // empty: at once
  bool done = false;
  std::size_t products = 0;                // matrix instructions issued so far
  bool fenced = false;                     // no registers touched since product_fence
  std::vector<std::uint32_t> unpublished;  // where it stored to shared memory
};

struct MBarrier {
  int expected, pending, bytes = 0;
  std::uint64_t phase = 0;
};

struct NamedBarrier {
  int arrived = 0;
  std::uint64_t generation = 0;
  bool any = false, any_of_last = false;
};

struct Exchange {  // of a warp
  int arrived = 0;
  std::uint64_t generation = 0;
  double value[2][kWarpThreads];
};

struct Copy {
  std::uint32_t to;
  MatrixMap map;
  int row, column;
  std::uint32_t barrier;
  unsigned blocks;  // of the cluster, a bit each; 0: this one
};

// What all threads of a warpgroup ask of the matrix unit together.
struct MatrixCall {
  enum Kind { kAlongRows, kAlongColumns, kBothShared, kCommit, kWait } kind;
  int columns = 0, pending = 0;
  bool is_bfloat16 = false, accumulate = false, done = false;
  std::uint64_t a = 0, b = 0;
  int threads = 0;
  float* d[kGroupThreads];
  const std::uint32_t* a_registers[kGroupThreads];

  bool same(const MatrixCall& o) const {
    return kind == o.kind && columns == o.columns && pending == o.pending &&
           is_bfloat16 == o.is_bfloat16 && accumulate == o.accumulate && a == o.a && b == o.b;
  }
};

struct Block {
  int num_threads, index, num_blocks;
  std::vector<std::unique_ptr<Block>>* cluster;
  bool eager;
  bool late = false;  // copies end, in any order, only where all threads wait for one
  std::mt19937 random;
  std::vector<Fiber> fibers;
  std::vector<std::uint8_t> shared;
  std::vector<char> unpublished;  // for each word of `shared`: stored to, not published
  std::map<std::uint32_t, MBarrier> barriers;
  std::map<int, NamedBarrier> named;
  std::vector<Exchange> exchanges;
  std::vector<Copy> copies;
  std::vector<std::vector<MatrixCall>> matrix_calls;  // by warpgroup
  ucontext_t scheduler;
  Fiber* current = nullptr;
  int still_group = 0, still_for = 0;  // rounds
  std::function<void()> body;

  int thread() const { return static_cast<int>(current - fibers.data()); }

  void wait_until(std::function<bool()> may_go) {
    if (may_go()) return;
    current->may_go = std::move(may_go);
    swapcontext(&current->context, &scheduler);
  }

  // Now and then, lets the others go first.
  void dawdle() {
    if (random() % 32 != 0) return;
    current->may_go = nullptr;
    swapcontext(&current->context, &scheduler);
  }

  bool has_ended() const {
    return std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.done; });
  }

  // A block of the cluster, which another one is about to touch.
  Block& other(std::size_t rank) {
    if (rank >= cluster->size()) fail("no such block in the cluster");
    Block& b = *(*cluster)[rank];
    if (&b != this && b.has_ended()) fail("a block of the cluster has ended");
    return b;
  }

  std::uint8_t* at(std::uint32_t address, std::size_t bytes) {
    if (address < kSharedBase || address + bytes > kSharedBase + shared.size())
      fail("access outside of shared memory");
    return shared.data() + (address - kSharedBase);
  }

  void store(std::uint32_t address, const void* value, std::uint32_t bytes) {
    std::memcpy(at(address, bytes), value, bytes);
    for (std::uint32_t word = address; word < address + bytes; word += 4) {
      unpublished[(word - kSharedBase) / 4] = 1;
      current->unpublished.push_back(word);
    }
  }

  void publish() {
    for (const std::uint32_t word : current->unpublished) unpublished[(word - kSharedBase) / 4] = 0;
    current->unpublished.clear();
  }

  // For the copy engine and the matrix unit.
  std::uint8_t* at_published(std::uint32_t address, std::size_t bytes) {
    std::uint8_t* place = at(address, bytes);
    if (unpublished[(address - kSharedBase) / 4]) fail("what a thread stored was not published");
    return place;
  }

  MBarrier& barrier(std::uint32_t address) {
    const auto found = barriers.find(address);
    if (found == barriers.end()) fail("an mbarrier was used before it was initialised");
    return found->second;
  }

  void end_phase_if_complete(MBarrier& b) {
    if (b.pending > 0 || b.bytes != 0) return;
    ++b.phase;
    b.pending = b.expected;
  }

  void complete_copy(std::size_t number) {
    const Copy copy = copies[number];
    copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(number));
    if (copy.blocks == 0) receive(copy);
    for (std::size_t rank = 0; copy.blocks >> rank != 0; ++rank) {
      if (copy.blocks >> rank & 1) other(rank).receive(copy);
    }
  }

  void receive(const Copy& copy) {
    if (copy.to % kSwizzleBytes != 0) fail("a box must lie at a multiple of 1024 bytes");
    for (int r = 0; r < copy.map.box_rows; ++r) {
      for (int c = 0; c < copy.map.box_columns; ++c) {
        const std::int64_t row = copy.row + r, column = copy.column + c;
        const bool inside = row < copy.map.rows && column < copy.map.columns;
        std::uint16_t value = 0;
        if (inside) {
          std::memcpy(
              &value,
              static_cast<const char*>(copy.map.data) + row * copy.map.row_bytes + 2 * column, 2);
        }
        const std::uint32_t address = copy.to + r * kRowBytes + 2 * c;
        std::memcpy(at_published(address ^ (address >> 7 & 7) << 4, 2), &value, 2);
      }
    }
    MBarrier& b = barrier(copy.barrier);
    b.bytes -= copy.map.box_rows * copy.map.box_columns * 2;
    end_phase_if_complete(b);
  }

  float element(std::uint32_t address, bool is_bfloat16) {
    std::uint16_t bits;
    std::memcpy(&bits, at_published(address ^ (address >> 7 & 7) << 4, 2), 2);
    return is_bfloat16 ? to_compute(BFloat16{bits}) : to_compute(Float16{bits});
  }

  // Element (row, k) of an operand read along its rows; (k, column) of one read along its columns.
  float operand(std::uint64_t descriptor, int row, int k, bool along_columns, bool is_bfloat16) {
    if (descriptor >> 62 != 1) fail("a matrix descriptor without the 128-byte swizzle");
    const auto field = [&](int bit) {
      return static_cast<std::uint32_t>(descriptor >> bit & 0x3fff) << 4;
    };
    const std::uint32_t start = field(0), leading = field(16), stride = field(32);
    const std::uint32_t offset = along_columns
                                     ? row / kPanelColumns * leading + row % kPanelColumns * 2 +
                                           k / 8 * stride + k % 8 * kRowBytes
                                     : row / 8 * stride + row % 8 * kRowBytes + k * 2;
    return element(start + offset, is_bfloat16);
  }

  void multiply(MatrixCall& call) {
    constexpr int kRows = 64;
    const int N = call.columns;
    std::vector<float> a(kRows * kProductDepth), b(static_cast<std::size_t>(N) * kProductDepth);
    const bool along_columns = call.kind != MatrixCall::kAlongRows;
    for (int n = 0; n < N; ++n) {
      for (int k = 0; k < kProductDepth; ++k)
        b[n * kProductDepth + k] = operand(call.b, n, k, along_columns, call.is_bfloat16);
    }
    for (int m = 0; m < kRows; ++m) {
      for (int k = 0; k < kProductDepth; ++k) {
        if (call.kind != MatrixCall::kAlongColumns) {
          a[m * kProductDepth + k] = operand(call.a, m, k, false, call.is_bfloat16);
          continue;
        }
        // Registers 0..3: rows r and r + 8, columns 2 (lane % 4) (+ 1), then the same 8 columns on.
        const int thread = m / 16 * 32 + m % 8 * 4 + k % 8 / 2;
        const std::uint32_t packed = call.a_registers[thread][k / 8 * 2 + m % 16 / 8];
        const std::uint16_t bits = static_cast<std::uint16_t>(k % 2 ? packed >> 16 : packed);
        a[m * kProductDepth + k] =
            call.is_bfloat16 ? to_compute(BFloat16{bits}) : to_compute(Float16{bits});
      }
    }
    for (int m = 0; m < kRows; ++m) {
      for (int n = 0; n < N; ++n) {
        float sum = 0;
        for (int k = 0; k < kProductDepth; ++k)
          sum += a[m * kProductDepth + k] * b[n * kProductDepth + k];
        const int thread = m / 16 * 32 + m % 8 * 4 + n % 8 / 2;
        float& d = call.d[thread][n / 8 * 4 + m % 16 / 8 * 2 + n % 2];
        d = along_columns || call.accumulate ? d + sum : sum;
      }
    }
    call.done = true;
  }

  static bool is_product(const MatrixCall& call) { return call.kind < MatrixCall::kCommit; }

  // Joins this thread to its warpgroup's next call.
  void matrix_call(const MatrixCall& mine, float* d, const std::uint32_t* a_registers) {
    dawdle();
    if (is_product(mine) && !current->fenced) fail("a product without a fence before it");
    if (mine.kind == MatrixCall::kWait) current->fenced = false;
    const int group = thread() / kGroupThreads;
    std::vector<MatrixCall>& calls = matrix_calls[group];
    const std::size_t number = current->products++;
    if (number == calls.size()) calls.push_back(mine);
    if (!calls[number].same(mine)) fail("threads of a warpgroup disagree in a matrix instruction");
    calls[number].d[thread() % kGroupThreads] = d;
    calls[number].a_registers[thread() % kGroupThreads] = a_registers;
    if (++calls[number].threads == kGroupThreads) {
      if (is_product(mine) && eager) multiply(calls[number]);
      if (mine.kind == MatrixCall::kWait) finish_groups(calls, number, mine.pending);
    }
    if (mine.kind != MatrixCall::kWait) return;
    wait_until(
        [this, group, number] { return matrix_calls[group][number].threads == kGroupThreads; });
  }

  // Products whose group is not one of the last `pending`.
  void finish_groups(std::vector<MatrixCall>& calls, std::size_t wait, int pending) {
    std::size_t end = wait;
    for (int left = pending; end > 0; --end) {
      if (calls[end - 1].kind == MatrixCall::kCommit && left-- == 0) break;
    }
    for (std::size_t n = 0; n < end; ++n) {
      if (is_product(calls[n]) && !calls[n].done) multiply(calls[n]);
    }
  }

  double exchange(double mine, int lane) {
    Exchange& e = exchanges[thread() / kWarpThreads];
    const std::uint64_t generation = e.generation;
    e.value[generation % 2][thread() % kWarpThreads] = mine;
    if (++e.arrived == kWarpThreads) {
      e.arrived = 0;
      ++e.generation;
    }
    wait_until([&e, generation] { return e.generation != generation; });
    return e.value[generation % 2][lane];
  }

  bool come(int name, int threads, bool waits, bool condition = false) {
    NamedBarrier& b = named[name];
    const std::uint64_t generation = b.generation;
    b.any |= condition;
    if (++b.arrived == threads) {
      b.arrived = 0;
      b.any_of_last = b.any;
      b.any = false;
      ++b.generation;
    }
    if (waits) wait_until([&b, generation] { return b.generation != generation; });
    return b.any_of_last;
  }

  // Once around: whether anything went on. Now and then a warpgroup stands still for a while.
  bool go_on() {
    bool progress = false;
    if (still_for == 0 && random() % 16 == 0) {
      still_group = static_cast<int>(random() % matrix_calls.size());
      still_for = 1 + static_cast<int>(random() % 64);
    }
    const bool any_still = still_for > 0;
    still_for -= any_still;
    std::vector<int> order(fibers.size());
    for (std::size_t n = 0; n < order.size(); ++n) order[n] = static_cast<int>(n);
    std::shuffle(order.begin(), order.end(), random);
    for (const int n : order) {
      Fiber& fiber = fibers[n];
      if (any_still && n / kGroupThreads == still_group) continue;
      if (fiber.done || (fiber.may_go && !fiber.may_go())) continue;
      fiber.may_go = nullptr;
      progress = true;
      current = &fiber;
      swapcontext(&scheduler, &fiber.context);
    }
    if (!copies.empty() && (!progress || eager || (!late && random() % 2 == 0))) {
      complete_copy(random() % copies.size());
      progress = true;
    }
    if (progress || !any_still) return progress;
    still_for = 0;  // nothing else goes on
    return true;
  }

  void check_end() const {
    for (const auto& [name, barrier] : named) {
      if (barrier.arrived != 0) fail("a named barrier was left half full");
    }
    if (!copies.empty()) fail("a copy was under way when the block ended");
  }
};

inline Block*& block() {
  static Block* current = nullptr;
  return current;
}

inline void start_fiber() {
  block()->body();
  block()->current->done = true;
  swapcontext(&block()->current->context, &block()->scheduler);
}

inline void prepare_fiber(Fiber& fiber, char* stack) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, start_fiber, 0);
}

using Cluster = std::vector<std::unique_ptr<Block>>;

// Until all threads of all its blocks have ended; now and then one block runs on alone.
inline void run_cluster(Cluster& cluster) {
  const auto ended = [](const std::unique_ptr<Block>& b) { return b->has_ended(); };
  while (!std::all_of(cluster.begin(), cluster.end(), ended)) {
    bool progress = false;
    for (const std::unique_ptr<Block>& b : cluster) {
      block() = b.get();
      bool went_on = b->go_on();
      progress |= went_on;
      for (int more = static_cast<int>(b->random() % 4 * 8); went_on && more > 0; --more)
        went_on = b->go_on();
    }
    if (!progress && !std::all_of(cluster.begin(), cluster.end(), ended))
      fail("all threads wait: deadlock");
  }
  for (const std::unique_ptr<Block>& b : cluster) b->check_end();
}

// Runs `body` in every thread of each block, one cluster of blocks after the other.
inline void launch(int blocks, int threads, std::size_t shared_bytes, bool eager, unsigned seed,
                   const std::function<void()>& body, int cluster_size = 1) {
  std::vector<std::unique_ptr<char[]>> stacks;
  for (int t = 0; t < threads * cluster_size; ++t) stacks.emplace_back(new char[kStackBytes]);
  if (blocks % cluster_size != 0) fail("a grid that clusters don't divide");
  for (int first = 0; first < blocks; first += cluster_size) {
    Cluster cluster;
    for (int rank = 0; rank < cluster_size; ++rank) {
      cluster.emplace_back(new Block);
      Block& b = *cluster.back();
      b.num_threads = threads, b.index = first + rank, b.num_blocks = blocks;
      b.cluster = &cluster;
      b.eager = eager;
      b.random.seed(seed + b.index);
      b.late = b.random() % 2 == 0;
      b.shared.assign(shared_bytes, 0xff);
      b.unpublished.assign((shared_bytes + 3) / 4, 0);
      b.exchanges.resize((threads + kWarpThreads - 1) / kWarpThreads);
      b.matrix_calls.resize((threads + kGroupThreads - 1) / kGroupThreads);
      b.body = body;
      b.fibers.resize(threads);
      for (int t = 0; t < threads; ++t)
        prepare_fiber(b.fibers[t], stacks[rank * threads + t].get());
    }
    run_cluster(cluster);
  }
}

}  // namespace emulator

inline emulator::Block& emulated() { return *emulator::block(); }

inline int thread_index() { return emulated().thread(); }
inline int block_index() { return emulated().index; }
inline int num_blocks() { return emulated().num_blocks; }
inline int block_of_cluster() {
  const emulator::Cluster& cluster = *emulated().cluster;
  return emulated().index % static_cast<int>(cluster.size());
}
// Counted at the first block's barrier of a name that no kernel has.
inline void sync_cluster() {
  const emulator::Cluster& cluster = *emulated().cluster;
  emulator::NamedBarrier& b = cluster[0]->named[-1];
  const std::uint64_t generation = b.generation;
  if (++b.arrived == emulated().num_threads * static_cast<int>(cluster.size())) {
    b.arrived = 0;
    ++b.generation;
  }
  emulated().wait_until([&b, generation] { return b.generation != generation; });
}
inline void sync_block() { emulated().come(0, emulated().num_threads, true); }
inline bool sync_block_or(bool condition) {
  return emulated().come(0, emulated().num_threads, true, condition);
}
inline void sync_warp() { emulated().exchange(0, 0); }
inline bool any_in_warp(bool condition) {
  double any = condition;
  for (int lanes = 1; lanes < 32; lanes *= 2)
    any = std::max(any, emulated().exchange(any, (thread_index() % 32) ^ lanes));
  return any != 0;
}
inline std::uint32_t ballot_in_warp(bool condition) {
  std::uint32_t bits = std::uint32_t{condition} << thread_index() % 32;
  for (int lanes = 1; lanes < 32; lanes *= 2)
    bits |= static_cast<std::uint32_t>(emulated().exchange(bits, (thread_index() % 32) ^ lanes));
  return bits;
}
inline int count_bits(std::uint32_t bits) { return __builtin_popcount(bits); }
inline int lowest_bit(std::uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)) - 1; }
inline int highest_bit(std::uint32_t bits) { return bits == 0 ? -1 : 31 - __builtin_clz(bits); }
template <typename T>
T shuffle_xor(T value, int lanes) {
  return static_cast<T>(emulated().exchange(value, (thread_index() % 32) ^ lanes));
}
template <int kRegisters>
void lower_registers() {}
template <int kRegisters>
void raise_registers() {}
inline void wait_for_previous_grid() {}
inline void let_next_grid_begin() {}

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;
}
inline float reciprocal_approx(float x) { return 1 / x; }

template <typename Element>
std::uint32_t pack(float first, float second) {
  Element low, high;
  from_compute(first, &low);
  from_compute(second, &high);
  return low.bits | static_cast<std::uint32_t>(high.bits) << 16;
}
inline float to_float(BFloat16 value) { return to_compute(value); }
inline float to_float(Float16 value) { return to_compute(value); }
template <typename Element>
void from_float(float value, Element* out) {
  from_compute(value, out);
}

template <int kBytes>
void copy_async(void* to, const void* from) {
  emulated().current->copy_groups.back().push_back({to, from, kBytes});
}
inline void end_copy_group() { emulated().current->copy_groups.emplace_back(); }
template <int kLatest>  // done only here: as late as a thread may count on
void wait_for_copy_groups() {
  auto& groups = emulated().current->copy_groups;
  while (groups.size() > kLatest + 1) {
    for (const emulator::ThreadCopy& copy : groups.front())
      std::memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}

struct Word4 {
  std::uint32_t x, y, z, w;
};
inline Word4 load_shared(std::uint32_t address) {
  Word4 v;
  std::memcpy(&v, emulated().at(address, sizeof(v)), sizeof(v));
  return v;
}
inline float load_shared_float(std::uint32_t address) {
  float v;
  std::memcpy(&v, emulated().at(address, sizeof(v)), sizeof(v));
  return v;
}
inline void store_shared(std::uint32_t address, Word4 v) {
  emulated().store(address, &v, sizeof(v));
}
inline void store_shared_word(std::uint32_t address, std::uint32_t v) {
  emulated().store(address, &v, sizeof(v));
}
inline int load_shared_word(std::uint32_t address) {
  int v;
  std::memcpy(&v, emulated().at(address, sizeof(v)), sizeof(v));
  return v;
}
inline void store_shared_float(std::uint32_t address, float v) {
  emulated().store(address, &v, sizeof(v));
}
inline void store_pair(float* to, float first, float second) {
  if (reinterpret_cast<std::uintptr_t>(to) % 8 != 0) emulator::fail("a pair at an odd address");
  to[0] = first, to[1] = second;
}
inline std::uint64_t forget(std::uint64_t value) { return value; }
inline int forget(int value) { return value; }
inline std::uint32_t bits_of(float value) { return float_to_bits(value); }
inline float float_of(std::uint32_t bits) { return bits_to_float(bits); }

inline void barrier_init(std::uint32_t barrier, int arrivals) {
  emulated().at(barrier, 8);
  emulated().barriers[barrier] = {arrivals, arrivals};
}
inline void publish_barriers() {}
inline void arrive(emulator::Block& block, std::uint32_t barrier) {
  emulator::MBarrier& b = block.barrier(barrier);
  if (b.pending == 0) emulator::fail("more arrivals than an mbarrier expects");
  --b.pending;
  block.end_phase_if_complete(b);
}
inline void barrier_arrive(std::uint32_t barrier) { arrive(emulated(), barrier); }
inline void barrier_arrive_in_block(std::uint32_t barrier, int block, bool really) {
  if (really) arrive(emulated().other(static_cast<std::size_t>(block)), barrier);
}
inline void barrier_expect(std::uint32_t barrier, int bytes) {
  emulated().barrier(barrier).bytes += bytes;
  barrier_arrive(barrier);
}
inline void barrier_wait(std::uint32_t barrier, int parity) {
  emulator::MBarrier& b = emulated().barrier(barrier);
  emulated().wait_until([&b, parity] { return static_cast<int>(b.phase & 1) != parity; });
}
inline void named_barrier_sync(int name, int threads) { emulated().come(name, threads, true); }
inline void named_barrier_arrive(int name, int threads, bool really) {
  if (really) emulated().come(name, threads, false);
}

inline void prefetch_tensor_map(const TensorMap&) {}
inline void copy_box(std::uint32_t to, const TensorMap& map, int row, int column,
                     std::uint32_t barrier, std::uint64_t) {
  emulated().at(to, static_cast<std::size_t>(map.box_rows) * kRowBytes);
  emulated().copies.push_back({to, map, row, column, barrier, 0});
}
inline void copy_box_to_cluster(std::uint32_t to, const TensorMap& map, int row, int column,
                                std::uint32_t barrier, int blocks, std::uint64_t) {
  emulated().at(to, static_cast<std::size_t>(map.box_rows) * kRowBytes);
  emulated().copies.push_back({to, map, row, column, barrier, static_cast<unsigned>(blocks)});
}
inline void publish_to_async_proxy() { emulated().publish(); }

inline void product_fence() { emulated().current->fenced = true; }
inline void product_commit() {
  emulator::MatrixCall call{};
  call.kind = emulator::MatrixCall::kCommit;
  emulated().matrix_call(call, nullptr, nullptr);
}
template <int kPending>
void product_wait() {
  emulator::MatrixCall call{};
  call.kind = emulator::MatrixCall::kWait;
  call.pending = kPending;
  emulated().matrix_call(call, nullptr, nullptr);
}

template <typename Element, int N>
struct Product {
  static emulator::MatrixCall call(emulator::MatrixCall::Kind kind, std::uint64_t b) {
    emulator::MatrixCall call{};
    call.kind = kind;
    call.columns = N;
    call.is_bfloat16 = std::is_same<Element, BFloat16>::value;
    call.b = b;
    return call;
  }
  static void along_rows(float (&d)[N / 2], std::uint64_t a, std::uint64_t b, bool accumulate) {
    emulator::MatrixCall mine = call(emulator::MatrixCall::kAlongRows, b);
    mine.a = a;
    mine.accumulate = accumulate;
    emulated().matrix_call(mine, d, nullptr);
  }
  static void along_columns(float (&d)[N / 2], const std::uint32_t* a, std::uint64_t b) {
    emulated().matrix_call(call(emulator::MatrixCall::kAlongColumns, b), d, a);
  }
  static void along_columns(float (&d)[N / 2], std::uint64_t a, std::uint64_t b) {
    emulator::MatrixCall mine = call(emulator::MatrixCall::kBothShared, b);
    mine.a = a;
    emulated().matrix_call(mine, d, nullptr);
  }
};

}  // namespace sm90
}  // namespace codir_fast
