// What the bindings of the contrastive operators share on the CPU: rows as their kernels take them,
// and gradients with respect to what was given.
#pragma once

#include <vector>

#include "binding.h"
#include "executor.h"
#include "unit_rows.h"

namespace codir_fast {
namespace {

// Query or positive rows as a kernel takes them: dense, in the dtype of its arithmetic, of unit
// length if `normalize`.
struct PreparedRows {
  Tensor rows;
  std::vector<double> inverse_norm;  // empty unless normalised
};

inline DType compute_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// The torch dtype of compute_dtype.
inline std::int32_t torch_dtype(DType compute) {
  return compute == DType::kFloat64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

inline PreparedRows prepare_rows(const Tensor& given, const char* name, DType compute,
                                 bool normalize) {
  const DType dtype = dtype_of(given, name);
  if (!normalize && dtype == compute) return {dense(given), {}};
  const Tensor rows = dense(given);
  const std::int64_t N = rows.size(0), D = rows.size(1);
  PreparedRows out{new_tensor(torch_dtype(compute), {N, D}),
                   std::vector<double>(normalize ? N : 0)};
  check_status(
      unit_rows_cpu(out.rows.mutable_data_ptr(), normalize ? out.inverse_norm.data() : nullptr,
                    rows.const_data_ptr(), N, D, dtype, compute, torch_executor()),
      name);
  return out;
}

// The gradient with respect to what was given, in place of the one with respect to `rows`.
inline void bring_back(const Tensor& gradient, const PreparedRows& rows, DType compute) {
  if (rows.inverse_norm.empty()) return;
  check_status(unit_rows_backward_cpu(gradient.mutable_data_ptr(), rows.rows.const_data_ptr(),
                                      rows.inverse_norm.data(), gradient.size(0), gradient.size(1),
                                      compute, torch_executor()),
               "gradient");
}

inline double scalar_value(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == 1 && tensor.is_cpu(), "`", name,
                  "` must be a scalar tensor on the CPU");
  if (tensor.scalar_type() == ScalarType::Double) return *tensor.const_data_ptr<double>();
  check_dtype(tensor, name, ScalarType::Float, "float32 or float64");
  return *tensor.const_data_ptr<float>();
}

}  // namespace
}  // namespace codir_fast
