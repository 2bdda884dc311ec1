// Which kernels a call of bank_contrast_sm90 launches, and with what: everything that the host does
// but the launches themselves, which a Launcher makes (cuda, or the tests' emulator).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "bank_contrast_sm90.h"
#include "sm90/bank_contrast_combine.h"
#include "sm90/bank_contrast_pass.h"

namespace codir_fast {
namespace sm90 {

inline bool is_masked(const BankContrastSm90& in) {
  return in.labels != nullptr || in.exclude_index != nullptr || in.valid != nullptr;
}

// A fixed shift where weights in bfloat16 fit it. A temperature on the device is looked at there:
// where it is too low, the pass that mends what the fixed shift can't does all the work.
inline Weighing choose_weighing(const BankContrastSm90& in) {
  if (in.objective == Objective::kNce) return Weighing::kNce;
  const bool fits = in.inv_temperature.on_device != nullptr ||
                    static_cast<float>(in.inv_temperature.value) * kLog2E <= kMaxFixedShift;
  return in.dtype == DType::kBFloat16 && fits && !is_masked(in) ? Weighing::kFixedShift
                                                                : Weighing::kRunningMaximum;
}

inline Plan make_plan(const BankContrastSm90& in, int num_multiprocessors) {
  return make_plan(static_cast<int>(in.B), static_cast<int>(in.K), static_cast<int>(in.D),
                   choose_weighing(in), num_multiprocessors);
}

inline bool prepares_queries(const BankContrastSm90& in) {
  return in.normalize || why_not_mapped(matrix_map(in.query, in.B, in.D, kConsumerRows)) != nullptr;
}

// Offsets in bytes of what a call keeps beside its inputs and outputs.
struct Workspace {
  std::size_t maximum, total, rows, queries, bytes;
};

inline Workspace workspace(const BankContrastSm90& in, const Plan& plan) {
  Workspace at{};
  const auto place = [&](std::size_t bytes) {
    const std::size_t begin = at.bytes;
    at.bytes += (bytes + 255) / 256 * 256;
    return begin;
  };
  const std::size_t sums = std::size_t(plan.splits) * plan.B;
  at.maximum = place(sums * sizeof(float));
  at.total = place(sums * sizeof(float));
  at.rows = place(sums * plan.D * sizeof(float));
  at.queries = place(prepares_queries(in) ? std::size_t(plan.B) * plan.D * 2 : 0);
  return at;
}

// Warps that share a query's splits in the combination: each reads its own at once, if they
// suffice.
inline int warps_per_query(int splits, int D) {
  const int dim = combined_dim(D);
  int warps = 1;
  while (warps < combine_warps(dim) && warps * splits_in_flight(dim) < splits) warps *= 2;
  return warps;
}

// The first error of the launches, null if none.
template <typename Launcher>
const char* launch_bank_contrast(Launcher& launcher, const BankContrastOutputs& outputs,
                                 const BankContrastSm90& in, void* workspace_memory,
                                 int num_multiprocessors) {
  if (in.B == 0) return nullptr;
  const Weighing weighing = choose_weighing(in);
  const Plan plan = make_plan(in, num_multiprocessors);
  const Workspace at = workspace(in, plan);
  const auto place = [&](std::size_t offset) {
    return static_cast<unsigned char*>(workspace_memory) + offset;
  };
  const void* queries = in.query;
  const bool prepares = prepares_queries(in);
  if (prepares) {
    queries = place(at.queries);
    const char* error =
        launcher.prepare(in.dtype, place(at.queries), in.query, plan.B, plan.D, in.normalize);
    if (error != nullptr) return error;
  }
  const double c = in.noise_ratio;
  const double log_noise = in.objective == Objective::kNce ? std::log(c + kNceEps) : 0.0;
  const double extra = in.objective == Objective::kNce ? std::log1p(kNceEps / c) : 0.0;
  PassArguments pass{};
  pass.maximum = reinterpret_cast<float*>(place(at.maximum));
  pass.total = reinterpret_cast<float*>(place(at.total));
  pass.rows = reinterpret_cast<float*>(place(at.rows));
  pass.labels = in.labels, pass.bank_labels = in.bank_labels;
  pass.exclude_index = in.exclude_index, pass.valid = in.valid;
  pass.inv_temperature = in.inv_temperature, pass.log_partition = in.log_partition;
  pass.log_noise = static_cast<float>(log_noise), pass.extra = static_cast<float>(extra);
  pass.plan = plan;
  // What is read once is not worth a place in L2.
  pass.reads_once = plan.row_tiles == plan.cluster;
  const auto run_pass = [&](Weighing how, bool after_previous) {
    const Plan& p = pass.plan;
    const bool all = p.alternate || pass.only_bad;
    const int blocks =
        all ? p.num_items : std::min(p.num_items, num_multiprocessors / p.cluster * p.cluster);
    return launcher.pass(in.dtype, how, matrix_map(queries, in.B, in.D, kConsumerRows),
                         matrix_map(in.bank, in.K, in.D, box_rows(p)), pass, blocks,
                         after_previous);
  };
  if (plan.splits > 0) {
    if (const char* error = run_pass(weighing, prepares)) return error;
    if (weighing == Weighing::kFixedShift) {
      pass.plan = with_same_splits(plan, Weighing::kRunningMaximum);
      pass.only_bad = true;
      if (const char* error = run_pass(Weighing::kRunningMaximum, true)) return error;
    }
  }
  CombineArguments combine{};
  combine.loss = static_cast<float*>(outputs.loss), combine.lse = outputs.lse;
  combine.dquery = static_cast<float*>(outputs.dquery);
  combine.dpositive = static_cast<float*>(outputs.dpositive);
  combine.dinv_temperature = static_cast<float*>(outputs.dinv_temperature);
  combine.maximum = pass.maximum, combine.total = pass.total, combine.rows = pass.rows;
  combine.query = in.query, combine.positive = in.positive;
  combine.positive_is_float = in.positive_is_float;
  combine.inv_temperature = in.inv_temperature, combine.log_partition = in.log_partition;
  combine.log_noise = log_noise;
  combine.B = plan.B, combine.D = plan.D, combine.splits = plan.splits;
  combine.warps_per_query = warps_per_query(plan.splits, plan.D);
  combine.nce = in.objective == Objective::kNce, combine.normalize = in.normalize;
  // The first kernel of a call waits until all that was launched before has ended.
  return launcher.combine(
      in.dtype, combine,
      ceil_div(in.B, combine_warps(combined_dim(plan.D)) / combine.warps_per_query),
      prepares || plan.splits > 0);
}

}  // namespace sm90
}  // namespace codir_fast
