// The sm_90 kernels of bank_contrast without a GPU: how work is cut, what the hardware is told of
// tiles, and the kernels' own source in an emulator of the instructions, against double.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "sm90/bank_contrast_launches.h"

using namespace codir_fast;
using namespace codir_fast::sm90;

namespace {

constexpr int kSharedLimit = 227 << 10;  // bytes a block may have
constexpr int kRegisters = 64 << 10;     // of a multiprocessor
const Weighing kWeighings[] = {Weighing::kFixedShift, Weighing::kRunningMaximum, Weighing::kNce};

void test_tiles_fit_the_multiprocessor() {
  for (const int D : {64, 128, 256, 384, 512}) {
    for (const Weighing weighing : kWeighings) {
      const PassTile tile = pass_tile(D, weighing);
      const SharedLayout at = shared_layout(D, weighing);
      CHECK(at.bytes <= kSharedLimit);
      CHECK(at.query_bytes % kSwizzleBytes == 0 && at.tile_bytes % kSwizzleBytes == 0);
      CHECK(at.tiles % kSwizzleBytes == 0 && panel_bytes(tile.block_k) % kSwizzleBytes == 0);
      CHECK(at.weights % kSwizzleBytes == 0 && at.weight_bytes % kSwizzleBytes == 0);
      // Blocks of a cluster of two bring whole patterns each.
      CHECK(!is_wide(D) || tile.block_k / 2 * kRowBytes % kSwizzleBytes == 0);
      CHECK(at.columns % 16 == 0 && at.exchange % 4 == 0 && at.barriers % 8 == 0);
      CHECK(tile.block_k % kProductDepth == 0);
      // A block starts with as many registers as its threads divide evenly, in steps of 8; what
      // the producer gives back is what consumers take.
      const int at_launch = kRegisters / num_threads(tile) / 8 * 8;
      const int after = tile.producer_registers + tile.consumers * tile.consumer_registers;
      CHECK(after <= at_launch * (1 + tile.consumers));
      CHECK(tile.producer_registers % 8 == 0 && tile.producer_registers >= 24);
      CHECK(tile.consumer_registers % 8 == 0 && tile.consumer_registers <= 255);
    }
  }
}

// Every pair of a query and a bank row belongs to one item.
void test_plan_covers(int B, int K, int D, Weighing weighing, int multiprocessors) {
  const Plan plan = make_plan(B, K, D, weighing, multiprocessors);
  CHECK(plan.row_tiles * plan.block_b >= B && (plan.row_tiles - plan.cluster) * plan.block_b < B);
  CHECK(!plan.alternate || plan.num_items <= multiprocessors);
  CHECK(plan.cluster == 1 || (is_wide(padded_dim(D)) && plan.row_tiles % plan.cluster == 0));
  CHECK(plan.cluster <= multiprocessors);
  CHECK(box_rows(plan) * plan.cluster == pass_tile(padded_dim(D), weighing).block_k);
  CHECK(plan.splits <= 1 || partial_bytes(plan.splits, B, D) <= kMaxPartialBytes);
  for (const Weighing of_items : {weighing, Weighing::kRunningMaximum}) {
    const Plan p = with_same_splits(plan, of_items);
    CHECK(p.row_tiles * p.block_b >= B);
    int row = 0;
    for (int split = 0; split < p.splits; ++split) {
      for (int row_tile = 0; row_tile < p.row_tiles; ++row_tile) {
        const Item item = item_at(p, split * p.row_tiles + row_tile);
        CHECK(item.split == split && item.row_tile == row_tile);
        CHECK(item.first_row == row && item.num_steps > 0);
        CHECK(step_row(p, item, item.num_steps - 1) == item.first_row);
        const int last = step_row(p, item, 0);
        CHECK(last < item.end_row && item.end_row <= last + p.block_k);
        if (row_tile == p.row_tiles - 1) row = item.end_row;
      }
    }
    CHECK(row == K);
  }
}

void test_plans() {
  for (const Weighing weighing : kWeighings) {
    for (const int multiprocessors : {1, 7, 132}) {
      for (const int B : {1, 63, 64, 65, 128, 200, 1024, 4097}) {
        for (const int K : {0, 1, 79, 80, 128, 129, 5000, 65536}) {
          for (const int D : {8, 64, 72, 128, 200, 256, 264, 384, 512})
            test_plan_covers(B, K, D, weighing, multiprocessors);
        }
      }
    }
  }
  // The named shapes keep at least 94 % of 132 multiprocessors busy.
  const int shapes[][3] = {{32, 65536, 128},   {64, 1 << 20, 128},   {256, 65536, 128},
                           {1024, 65536, 128}, {4096, 1 << 20, 128}, {4096, 65536, 64},
                           {4096, 65536, 256}, {4096, 65536, 512},   {1024, 65536, 384}};
  for (const auto& shape : shapes) {
    const Plan plan = make_plan(shape[0], shape[1], shape[2], Weighing::kFixedShift, 132);
    const int waves = ceil_div(plan.num_items, 132);
    const double rows = double(waves) * plan.rows_per_split * 132;
    CHECK(double(shape[1]) * plan.row_tiles / rows > 0.94);
  }
  // No more rows than coordinates of the copy engine: nothing wraps at the end.
  for (const Weighing weighing : kWeighings) {
    const Plan largest = make_plan(1, int{kMaxRows}, 64, weighing, 132);
    const Item last = item_at(largest, largest.num_items - 1);
    CHECK(last.end_row == kMaxRows);
    CHECK(std::int64_t{step_row(largest, last, 0)} + 2 * largest.block_k <= INT32_MAX);
  }
}

void test_ring() {
  for (int n = 0; n < 40; ++n) {
    const RingPlace place = ring_place(n, 5);
    CHECK(place.stage == n % 5 && place.phase == n / 5 % 2);
  }
}

void test_matrix_maps() {
  alignas(16) static const char memory[64] = {};
  CHECK(why_not_mapped(matrix_map(memory, 5, 64, 128)) == nullptr);
  CHECK(why_not_mapped(matrix_map(memory, 5, 60, 128)) != nullptr);
  CHECK(why_not_mapped(matrix_map(memory + 2, 5, 64, 128)) != nullptr);
  CHECK(why_not_mapped(matrix_map(memory, kMaxRows + 1, 64, 128)) != nullptr);
  const MatrixMap map = matrix_map(memory, 5, 64, 80);
  CHECK(map.row_bytes == 128 && map.box_rows == 80 && map.box_columns == 64);
}

// Numbers from the PTX ISA, not from the functions themselves.
void test_descriptors() {
  CHECK(matrix_descriptor(0x8400, 16, 1024) == 0x4000004000010840ull);
  // Columns 16..31 of a row lie 32 bytes on; columns 64..79 in the next panel, here of 128 rows.
  CHECK(along_rows(along_rows(0x8400u), 128, 1) == 0x4000004000010842ull);
  CHECK(along_rows(along_rows(0x8400u), 128, 4) == 0x4000004000010c40ull);
  // 16 rows are 2 kB; the next 64 columns are a panel of 80 rows on.
  CHECK(along_columns(0x8400u, 80) == (0x4000004000000840ull | 0x280ull << 16));
  CHECK(along_columns(along_columns(0x8400u, 80), 3) ==
        (0x4000004000000840ull | 0x280ull << 16) + 0x180);
}

// Runs the launches in the emulator, one after the other. The first of a call must not overlap with
// what was launched before it: that is not the call's own.
struct EmulatedLauncher {
  bool eager;
  unsigned seed;
  bool any_before = false;

  void count(bool after_previous) {
    CHECK(any_before || !after_previous);
    any_before = true;
  }

  template <typename Run>
  static void with_element(DType dtype, const Run& run) {
    if (dtype == DType::kBFloat16)
      run(BFloat16{});
    else
      run(Float16{});
  }

  // With the columns that the kernels before and after the pass are compiled for.
  template <typename Run>
  static void with_columns(int D, const Run& run) {
    const int dim = combined_dim(D);
    if (dim == 64) return run(std::integral_constant<int, 64>());
    if (dim == 128) return run(std::integral_constant<int, 128>());
    if (dim == 256) return run(std::integral_constant<int, 256>());
    run(std::integral_constant<int, kMaxDim>());
  }

  const char* prepare(DType dtype, void* unit, const void* query, int B, int D, bool normalize) {
    count(false);
    with_element(dtype, [&](auto element) {
      using Element = decltype(element);
      with_columns(D, [&](auto dim) {
        constexpr int kWarps = combine_warps(dim.value);
        emulator::launch(ceil_div(B, kWarps), kWarps * kWarp, 0, eager, seed, [&] {
          prepare_queries<dim.value>(static_cast<Element*>(unit), query, B, D, normalize);
        });
      });
    });
    return nullptr;
  }

  template <typename Config>
  const char* run_pass(const MatrixMap& queries, const MatrixMap& bank, const PassArguments& a,
                       int blocks) const {
    CHECK(why_not_mapped(queries) == nullptr && why_not_mapped(bank) == nullptr);
    emulator::launch(
        blocks, num_threads(Config::kTile), Config::kLayout.bytes, eager, seed,
        [&] { bank_contrast_pass<Config>(queries, bank, a, emulator::kSharedBase); },
        a.plan.cluster);
    return nullptr;
  }

  template <typename Element, int kD>
  const char* run_pass(Weighing weighing, const MatrixMap& queries, const MatrixMap& bank,
                       const PassArguments& a, int blocks) const {
    if (weighing == Weighing::kNce)
      return run_pass<PassConfig<Element, kD, Weighing::kNce>>(queries, bank, a, blocks);
    if (weighing == Weighing::kFixedShift)
      return run_pass<PassConfig<Element, kD, Weighing::kFixedShift>>(queries, bank, a, blocks);
    return run_pass<PassConfig<Element, kD, Weighing::kRunningMaximum>>(queries, bank, a, blocks);
  }

  const char* pass(DType dtype, Weighing weighing, const MatrixMap& queries, const MatrixMap& bank,
                   const PassArguments& a, int blocks, bool after_previous) {
    count(after_previous);
    with_element(dtype, [&](auto element) {
      using Element = decltype(element);
      const int D = padded_dim(a.plan.D);
      if (D == 64) return run_pass<Element, 64>(weighing, queries, bank, a, blocks);
      if (D == 128) return run_pass<Element, 128>(weighing, queries, bank, a, blocks);
      if (D == 256) return run_pass<Element, 256>(weighing, queries, bank, a, blocks);
      if (D == 384) return run_pass<Element, 384>(weighing, queries, bank, a, blocks);
      return run_pass<Element, 512>(weighing, queries, bank, a, blocks);
    });
    return nullptr;
  }

  const char* combine(DType dtype, const CombineArguments& a, int blocks, bool after_previous) {
    count(after_previous);
    std::vector<double> exchange(combine_doubles(combined_dim(a.D)), std::nan(""));
    with_element(dtype, [&](auto element) {
      using Element = decltype(element);
      with_columns(a.D, [&](auto dim) {
        emulator::launch(blocks, combine_warps(dim.value) * kWarp, 0, eager, seed,
                         [&] { combine_splits<dim.value, Element>(a, exchange.data()); });
      });
    });
    return nullptr;
  }
};

struct Case {
  int B, K, D;
  DType dtype = DType::kBFloat16;
  double temperature = 0.07;
  bool labels = false, exclude = false, valid = false, nce = false, normalize = false;
  bool on_device = false;  // scalars
  bool float_positive = false;
  double bank_norm = 1;
  bool opposed = false;  // the bank and positives lie on the other side of the queries
  int multiprocessors = 3;
  bool eager = false;
  double peak = 0;  // not 0: a logit far above all others, of a row whose next element is 8
};

// Inputs in the type of the kernel, and as double.
struct Problem {
  Case c;
  std::vector<std::uint16_t> query, positive, bank;
  std::vector<float> positive_float;
  std::vector<double> query_value, positive_value, bank_value;
  std::vector<std::int64_t> labels, bank_labels, exclude;
  std::vector<char> valid;
  double inv_t, log_partition = 2.5;
  float inv_t_float;

  Problem(const Case& c, std::mt19937& random) : c(c) {
    std::normal_distribution<double> normal;
    const auto fill = [&](int rows, double norm, std::vector<std::uint16_t>* bits,
                          std::vector<double>* values) {
      for (int n = 0; n < rows; ++n) {
        std::vector<double> row(c.D);
        double square = 0;
        for (double& x : row) {
          x = normal(random) * (c.opposed ? 0.1 : 1) + (c.opposed ? 1 : 0);
          square += x * x;
        }
        for (const double x : row) {
          const float value = static_cast<float>(norm * x / std::sqrt(square));
          bits->push_back(to_bits(value));
          values->push_back(c.dtype == DType::kBFloat16 ? to_compute(BFloat16{bits->back()})
                                                        : to_compute(Float16{bits->back()}));
        }
      }
    };
    fill(c.B, c.normalize ? 3 : 1, &query, &query_value);
    const double side = c.opposed ? -1 : 1;
    fill(c.B, c.normalize ? 0.2 : side * c.bank_norm, &positive, &positive_value);
    fill(c.K, side * c.bank_norm, &bank, &bank_value);
    if (c.peak != 0) {
      const auto set = [&](int n, double value, std::vector<std::uint16_t>* bits,
                           std::vector<double>* values) {
        (*bits)[n] = to_bits(static_cast<float>(value));
        (*values)[n] = value;
      };
      for (int n = 0; n < c.B * c.D; ++n) set(n, n % c.D == 0, &query, &query_value);
      for (int n = 0; n < c.K * c.D; ++n)
        set(n, n == 0 ? c.peak : n == 1 ? 8 : 0, &bank, &bank_value);
    }
    for (const double x : positive_value) positive_float.push_back(static_cast<float>(x));
    // Labels that agree in their lower or upper halves.
    const std::int64_t names[] = {7, 7 + (std::int64_t{1} << 32), 8, 0};
    for (int i = 0; i < c.B; ++i) {
      labels.push_back(names[random() % 4]);
      exclude.push_back(static_cast<std::int64_t>(random() % (c.K + 2)) - 1);
    }
    for (int j = 0; j < c.K; ++j) {
      bank_labels.push_back(names[random() % 4]);
      valid.push_back(random() % 4 != 0);
      if (c.valid && !valid[j]) {  // may hold anything
        for (int d = 0; d < c.D; ++d) bank[j * c.D + d] = 0x7fff;
      }
    }
    inv_t_float = static_cast<float>(1 / c.temperature);
    inv_t = c.on_device ? inv_t_float : 1 / c.temperature;
  }

  std::uint16_t to_bits(float value) const {
    BFloat16 b;
    Float16 h;
    from_compute(value, &b);
    from_compute(value, &h);
    return c.dtype == DType::kBFloat16 ? b.bits : h.bits;
  }

  BankContrastSm90 inputs() const {
    BankContrastSm90 in{};
    in.query = query.data(), in.bank = bank.data();
    in.positive = c.float_positive ? static_cast<const void*>(positive_float.data())
                                   : static_cast<const void*>(positive.data());
    in.positive_is_float = c.float_positive;
    if (c.labels) in.labels = labels.data(), in.bank_labels = bank_labels.data();
    if (c.exclude) in.exclude_index = exclude.data();
    if (c.valid) in.valid = reinterpret_cast<const bool*>(valid.data());
    in.B = c.B, in.K = c.K, in.D = c.D, in.dtype = c.dtype;
    in.inv_temperature = {c.on_device ? std::nan("") : inv_t, c.on_device ? &inv_t_float : nullptr,
                          false};
    in.objective = c.nce ? Objective::kNce : Objective::kInfoNce;
    in.log_partition = {0, &log_partition, true};
    in.noise_ratio = 64.0 / 1000;
    in.normalize = c.normalize;
    return in;
  }

  bool is_negative(int i, int j) const {
    return !(c.labels && labels[i] == bank_labels[j]) && !(c.exclude && exclude[i] == j) &&
           !(c.valid && !valid[j]);
  }
};

struct Results {
  std::vector<float> loss, dquery, dpositive, dinv_t;
  std::vector<double> lse;

  explicit Results(const Case& c)
      : loss(c.B, NAN),
        dquery(c.B * c.D, NAN),
        dpositive(c.B * c.D, NAN),
        dinv_t(c.B, NAN),
        lse(c.B, NAN) {}
};

Results run(const Problem& problem, unsigned seed) {
  const Case& c = problem.c;
  Results results(c);
  const BankContrastSm90 in = problem.inputs();
  const Workspace at = workspace(in, make_plan(in, c.multiprocessors));
  std::vector<unsigned char> memory(at.bytes + 16, 0xff);
  unsigned char* aligned =
      memory.data() + 16 - reinterpret_cast<std::uintptr_t>(memory.data()) % 16;
  EmulatedLauncher launcher{c.eager, seed};
  CHECK(launch_bank_contrast(launcher,
                             {results.loss.data(), results.lse.data(), results.dquery.data(),
                              results.dpositive.data(), results.dinv_t.data()},
                             in, aligned, c.multiprocessors) == nullptr);
  return results;
}

// Largest differences from the formulas of bank_contrast.h in double, relative to what is usual.
void compare(const Problem& p, const Results& got, const std::string& name) {
  const Case& c = p.c;
  const double noise = 64.0 / 1000 + kNceEps;
  double worst_loss = 0, worst_query = 0, worst_positive = 0, worst_t = 0;
  double size_query = 0, size_positive = 0, size_t_ = 0, size_loss = 1;
  for (int i = 0; i < c.B; ++i) {
    std::vector<double> q(&p.query_value[i * c.D], &p.query_value[i * c.D] + c.D);
    std::vector<double> pos(&p.positive_value[i * c.D], &p.positive_value[i * c.D] + c.D);
    double nq = 1, np = 1;
    const auto dot = [&](const double* a, const double* b) {
      double sum = 0;
      for (int d = 0; d < c.D; ++d) sum += a[d] * b[d];
      return sum;
    };
    if (c.normalize) {
      nq = std::sqrt(dot(q.data(), q.data())), np = std::sqrt(dot(pos.data(), pos.data()));
      for (int d = 0; d < c.D; ++d) q[d] /= nq, pos[d] /= np;
    }
    const double sp = dot(q.data(), pos.data()) * p.inv_t;
    double largest = sp;
    std::vector<double> s(c.K, -INFINITY);
    for (int j = 0; j < c.K; ++j) {
      if (!p.is_negative(i, j)) continue;
      s[j] = dot(q.data(), &p.bank_value[j * c.D]) * p.inv_t;
      largest = std::fmax(largest, s[j]);
    }
    double loss, lse, weight;
    std::vector<double> direction(c.D, 0.0);
    if (c.nce) {
      lse = p.log_partition + std::log(noise);
      loss = std::log1p(std::exp(lse - sp));
      weight = 1 / (1 + std::exp(sp - lse));
    } else {
      double total = std::exp(sp - largest);
      for (const double x : s) total += std::exp(x - largest);
      lse = largest + std::log(total), loss = lse - sp;
      weight = 1 - std::exp(sp - lse);
    }
    for (int j = 0; j < c.K; ++j) {
      if (s[j] == -INFINITY) continue;
      double w = std::exp(s[j] - lse);
      if (c.nce) {
        loss += std::log1p(w) + std::log1p(kNceEps / (64.0 / 1000));
        w = w / (1 + w);
      }
      for (int d = 0; d < c.D; ++d) direction[d] += w * p.bank_value[j * c.D + d];
    }
    for (int d = 0; d < c.D; ++d) direction[d] -= weight * pos[d];
    const double dt = dot(q.data(), direction.data());
    const double dsp = -weight * dot(q.data(), pos.data());
    worst_loss = std::fmax(worst_loss, std::fabs(got.loss[i] - loss));
    CHECK_CLOSE(got.lse[i], lse, (c.nce ? 1e-9 : 2e-2) * (1 + std::fabs(lse)));
    size_loss = std::fmax(size_loss, loss);
    worst_t = std::fmax(worst_t, std::fabs(got.dinv_t[i] - dt));
    size_t_ = std::fmax(size_t_, std::fabs(dt));
    for (int d = 0; d < c.D; ++d) {
      double dq = direction[d] * p.inv_t, dp = -weight * q[d] * p.inv_t;
      if (c.normalize) {
        dq = (dq - dt * p.inv_t * q[d]) / nq;
        dp = (dp - dsp * p.inv_t * pos[d]) / np;
      }
      worst_query = std::fmax(worst_query, std::fabs(got.dquery[i * c.D + d] - dq));
      worst_positive = std::fmax(worst_positive, std::fabs(got.dpositive[i * c.D + d] - dp));
      size_query = std::fmax(size_query, std::fabs(dq));
      size_positive = std::fmax(size_positive, std::fabs(dp));
      if (std::isnan(got.dquery[i * c.D + d]) || std::isnan(got.dpositive[i * c.D + d]))
        worst_query = INFINITY;
    }
    if (std::isnan(got.loss[i]) || std::isnan(got.dinv_t[i])) worst_loss = INFINITY;
  }
  // Weights are rounded to the type of the products; unit queries too, which moves logits.
  const double eps = c.dtype == DType::kBFloat16 ? 1.0 / 256 : 1.0 / 2048;
  const double logits = c.normalize ? 0.3 * eps * p.inv_t : 1e-5;
  const double gradient = (2 + 4 * c.bank_norm) * eps + 4 * logits;
  const bool right = worst_loss <= 2 * logits * c.bank_norm * size_loss + 1e-6 &&
                     worst_query <= gradient * (size_query + p.inv_t * 1e-4) &&
                     worst_positive <= gradient * (size_positive + p.inv_t * 1e-4) &&
                     worst_t <= gradient * (size_t_ + 1);
  if (!right) {
    std::printf(
        "%s: off by %.3g (loss), %.3g of %.3g (query), %.3g of %.3g (positive), %.3g (1/t)\n",
        name.c_str(), worst_loss, worst_query, size_query, worst_positive, size_positive, worst_t);
  }
  CHECK(right);
}

std::string name_of(const Case& c) {
  return "B " + std::to_string(c.B) + ", K " + std::to_string(c.K) + ", D " + std::to_string(c.D) +
         (c.dtype == DType::kBFloat16 ? ", bfloat16" : ", float16") + ", t " +
         std::to_string(c.temperature) + (c.labels ? ", labels" : "") +
         (c.exclude ? ", exclude" : "") + (c.valid ? ", valid" : "") + (c.nce ? ", NCE" : "") +
         (c.normalize ? ", normalize" : "") + (c.eager ? ", eager" : "");
}

void test_case(const Case& c) {
  static std::mt19937 random(11);
  const Problem problem(c, random);
  const Results first = run(problem, static_cast<unsigned>(random()));
  compare(problem, first, name_of(c));
}

}  // namespace

int main() {
  test_tiles_fit_the_multiprocessor();
  test_plans();
  test_ring();
  test_matrix_maps();
  test_descriptors();
  std::vector<Case> cases;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    // Alternating consumers, one and more row tiles, a tail in rows, in the bank and in columns.
    const int sizes[][3] = {{1, 1, 8},
                            {64, 1000, 64},
                            {65, 130, 64},
                            {200, 700, 64},
                            {5, 300, 128},
                            {129, 897, 128},
                            {300, 500, 96},
                            {33, 500, 256},
                            {130, 400, 200},
                            // wide rows, in clusters from 65 queries on
                            {1, 1, 264},
                            {40, 700, 384},
                            {128, 450, 512},
                            {130, 300, 320}};
    for (const auto& size : sizes) {
      for (const bool eager : {false, true}) {
        Case c{size[0], size[1], size[2], dtype};
        c.eager = eager;
        cases.push_back(c);
        c.nce = true;
        cases.push_back(c);
        c.nce = false, c.labels = c.exclude = true;
        cases.push_back(c);
        c.valid = c.normalize = c.on_device = c.float_positive = true;
        cases.push_back(c);
        c.nce = true;
        cases.push_back(c);
      }
    }
    for (const double temperature : {1e-3, 0.01, 0.0231, 0.5, 100.0}) {
      for (const bool on_device : {false, true}) {
        for (const int D : {128, 384}) {
          Case c{70, 700, D, dtype, temperature};
          c.on_device = on_device;
          cases.push_back(c);
        }
      }
    }
    for (const int D : {296, 512}) {  // a row tile without queries; many items a block
      Case wide{530, 600, D, dtype};
      wide.multiprocessors = D == 512 ? 2 : 5;
      cases.push_back(wide);
      wide.labels = wide.valid = true;
      cases.push_back(wide);
    }
    Case far{100, 600, 400, dtype};
    far.bank_norm = 20;  // a maximum that grows in one tile and not in the other
    cases.push_back(far);
    far.opposed = true;
    cases.push_back(far);
    Case c{70, 700, 64, dtype};
    c.bank_norm = 20;  // sums overflow a fixed shift
    cases.push_back(c);
    c.opposed = true;  // or vanish
    cases.push_back(c);
    for (const double peak : {69.0, 80.0, 87.0, 88.0, 89.0}) {  // or fit, and their rows overflow
      Case alone{2, 70, 72, dtype, 1.0};
      alone.peak = peak;
      cases.push_back(alone);
      alone.D = 264;
      cases.push_back(alone);
    }
    c.opposed = false, c.bank_norm = 1, c.multiprocessors = 1;  // many items a block
    cases.push_back(c);
    c.B = 500, c.labels = true, c.multiprocessors = 2;
    cases.push_back(c);
    for (const int B : {60, 200}) {  // tiles take a stage of the ring several times
      Case many{B, 2500, 72, dtype};
      many.multiprocessors = 1;
      cases.push_back(many);
      many.exclude = many.valid = true;
      cases.push_back(many);
    }
    for (const int D : {64, 128, 256}) {  // likewise, by consumers that take tiles in turn
      Case turns{50, 2900, D, dtype};
      turns.multiprocessors = 1;
      for (int repeat = 0; repeat < 3; ++repeat) cases.push_back(turns);
      turns.exclude = true;
      cases.push_back(turns);
    }
    c.B = 20, c.K = 0;
    cases.push_back(c);
    c.B = 0, c.K = 10;
    cases.push_back(c);
  }
  for (const Case& c : cases) test_case(c);
  return check::exit_code();
}
