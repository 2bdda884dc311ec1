// bank_contrast and indexed_contrast on the CPU as PyTorch sees them; schemas
// are in binding.cpp.
#include <algorithm>
#include <cstdint>
#include <tuple>

#include "bank_contrast.h"
#include "binding_rows.h"
#include "executor.h"
#include "indexed_contrast.h"

namespace codir_fast {
namespace {

// Tensors made contiguous, kept alive while `view` points into them.
struct BankContrastArguments {
  PreparedRows query;
  Tensor bank, inv_temperature;
  OptionalTensor bank_scale, labels, bank_labels, exclude_index, valid;
  BankContrastInputs view;
};

BankContrastArguments bank_contrast_arguments(
    const Tensor& query, const Tensor& bank, const Tensor& inv_temperature,
    const OptionalTensor& bank_scale, const OptionalTensor& labels,
    const OptionalTensor& bank_labels, const OptionalTensor& exclude_index,
    const OptionalTensor& valid, const OptionalTensor& log_partition, std::int64_t num_noise,
    std::int64_t num_data, bool normalize) {
  STD_TORCH_CHECK(query.dim() == 2 && query.is_cpu(), "`query` must be a (B, D) tensor on the CPU");
  STD_TORCH_CHECK(bank.dim() == 2, "`bank` must be a (K, D) tensor");
  const std::int64_t B = query.size(0), K = bank.size(0), D = query.size(1);
  STD_TORCH_CHECK(D > 0, "`query` must have at least one column");
  check_size(bank, "bank", {K, D});
  STD_TORCH_CHECK(labels.has_value() == bank_labels.has_value(),
                  "`labels` and `bank_labels` go together");
  const DType compute = compute_dtype(dtype_of(query, "query"));
  const bool is_double = compute == DType::kFloat64;
  BankContrastArguments arguments{
      prepare_rows(query, "query", compute, normalize),
      dense(bank),
      inv_temperature,
      vector_argument(bank_scale, "bank_scale", K,
                      is_double ? ScalarType::Double : ScalarType::Float,
                      is_double ? "float64, as `query`" : "float32"),
      vector_argument(labels, "labels", B, ScalarType::Long, "int64"),
      vector_argument(bank_labels, "bank_labels", K, ScalarType::Long, "int64"),
      vector_argument(exclude_index, "exclude_index", B, ScalarType::Long, "int64"),
      vector_argument(valid, "valid", K, ScalarType::Bool, "bool"),
      {}};
  arguments.view = {arguments.query.rows.const_data_ptr(),
                    arguments.bank.const_data_ptr(),
                    data_or_null<void>(arguments.bank_scale),
                    data_or_null<std::int64_t>(arguments.labels),
                    data_or_null<std::int64_t>(arguments.bank_labels),
                    data_or_null<std::int64_t>(arguments.exclude_index),
                    data_or_null<bool>(arguments.valid),
                    B,
                    K,
                    D,
                    compute,
                    dtype_of(bank, "bank"),
                    scalar_value(inv_temperature, "inv_temperature"),
                    log_partition ? Objective::kNce : Objective::kInfoNce,
                    log_partition ? scalar_value(*log_partition, "log_partition") : 0.0,
                    static_cast<double>(num_noise) / static_cast<double>(num_data)};
  STD_TORCH_CHECK(!log_partition || (num_noise > 0 && num_data > 0),
                  "`num_noise` and `num_data` must be positive, got ", num_noise, " and ",
                  num_data);
  return arguments;
}

// Allocates the outputs and runs a kernel on them: run(outputs, positive data) -> Status.
template <typename Run>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> contrast(const char* op,
                                                            const Tensor& positive_view,
                                                            const BankContrastArguments& arguments,
                                                            bool normalize, const Run& run) {
  const std::int64_t B = arguments.view.B, D = arguments.view.D;
  const DType compute = arguments.view.dtype;
  check_size(positive_view, "positive", {B, D});
  const PreparedRows positive = prepare_rows(positive_view, "positive", compute, normalize);
  const std::int32_t dtype = torch_dtype(compute);
  Tensor loss = new_tensor(dtype, {B});
  Tensor lse = new_tensor(aoti_torch_dtype_float64(), {B});
  Tensor dquery = new_tensor(dtype, {B, D}), dpositive = new_tensor(dtype, {B, D});
  Tensor dinv_temperature = new_tensor(dtype, {B});
  check_status(
      run({loss.mutable_data_ptr(), lse.mutable_data_ptr<double>(), dquery.mutable_data_ptr(),
           dpositive.mutable_data_ptr(), dinv_temperature.mutable_data_ptr()},
          positive.rows.const_data_ptr()),
      op);
  bring_back(dquery, arguments.query, compute);
  bring_back(dpositive, positive, compute);
  return {loss, lse, dquery, dpositive, dinv_temperature};
}

// Allocates the bank's gradient and runs a kernel: run(dbank, grad_loss data, lse data) -> Status.
template <typename Run>
Tensor contrast_backward(const char* op, const Tensor& grad_loss_view, const Tensor& lse_view,
                         const Tensor& bank, const BankContrastInputs& view, const Run& run) {
  const std::int64_t B = view.B;
  const bool is_double = view.dtype == DType::kFloat64;
  const Tensor grad_loss = *vector_argument(grad_loss_view, "grad_loss", B,
                                            is_double ? ScalarType::Double : ScalarType::Float,
                                            is_double ? "float64, as `query`" : "float32");
  const Tensor lse = *vector_argument(lse_view, "lse", B, ScalarType::Double, "float64");
  Tensor dbank = new_tensor(bank, {bank.size(0), bank.size(1)});
  check_status(
      run(dbank.mutable_data_ptr(), grad_loss.const_data_ptr(), lse.const_data_ptr<double>()), op);
  return dbank;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bank_contrast(
    const Tensor& query, const Tensor& positive, const Tensor& bank, const Tensor& inv_temperature,
    const OptionalTensor& bank_scale, const OptionalTensor& labels,
    const OptionalTensor& bank_labels, const OptionalTensor& exclude_index,
    const OptionalTensor& valid, const OptionalTensor& log_partition, std::int64_t num_noise,
    std::int64_t num_data, bool normalize) {
  const BankContrastArguments arguments =
      bank_contrast_arguments(query, bank, inv_temperature, bank_scale, labels, bank_labels,
                              exclude_index, valid, log_partition, num_noise, num_data, normalize);
  return contrast("bank_contrast", positive, arguments, normalize,
                  [&](const BankContrastOutputs& outputs, const void* positive_data) {
                    return bank_contrast_cpu(outputs, positive_data, arguments.view,
                                             torch_executor());
                  });
}

Tensor bank_contrast_backward(const Tensor& grad_loss, const Tensor& query, const Tensor& bank,
                              const Tensor& inv_temperature, const Tensor& lse,
                              const OptionalTensor& bank_scale, const OptionalTensor& labels,
                              const OptionalTensor& bank_labels,
                              const OptionalTensor& exclude_index, const OptionalTensor& valid,
                              const OptionalTensor& log_partition, std::int64_t num_noise,
                              std::int64_t num_data, bool normalize) {
  const BankContrastArguments arguments =
      bank_contrast_arguments(query, bank, inv_temperature, bank_scale, labels, bank_labels,
                              exclude_index, valid, log_partition, num_noise, num_data, normalize);
  return contrast_backward("bank_contrast_backward", grad_loss, lse, bank, arguments.view,
                           [&](void* dbank, const void* grad_data, const double* lse_data) {
                             return bank_contrast_backward_cpu(dbank, grad_data, lse_data,
                                                               arguments.view, torch_executor());
                           });
}

struct IndexedContrastArguments {
  BankContrastArguments bank;
  Tensor index;
  IndexedContrastInputs view;
};

IndexedContrastArguments indexed_contrast_arguments(
    const Tensor& query, const Tensor& bank, const Tensor& inv_temperature,
    const Tensor& index_view, const OptionalTensor& bank_scale, const OptionalTensor& labels,
    const OptionalTensor& bank_labels, const OptionalTensor& exclude_index,
    const OptionalTensor& valid, const OptionalTensor& log_partition, std::int64_t num_noise,
    std::int64_t num_data, bool normalize) {
  IndexedContrastArguments arguments{
      bank_contrast_arguments(query, bank, inv_temperature, bank_scale, labels, bank_labels,
                              exclude_index, valid, log_partition, num_noise, num_data, normalize),
      dense(index_view),
      {}};
  const BankContrastInputs& view = arguments.bank.view;
  const Tensor& index = arguments.index;
  STD_TORCH_CHECK(index.dim() == 2, "`index` must have shape (B, M)");
  check_size(index, "index", {view.B, index.size(1)});
  check_dtype(index, "index", ScalarType::Long, "int64");
  const std::int64_t* row = index.const_data_ptr<std::int64_t>();
  const std::int64_t numel = index.numel();
  for (std::int64_t n = 0; n < numel; ++n) {
    STD_TORCH_CHECK(row[n] >= 0 && row[n] < view.K, "`index` must be in [0, ", view.K, "), got ",
                    row[n]);
  }
  arguments.view = {view, row, index.size(1)};
  return arguments;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> indexed_contrast(
    const Tensor& query, const Tensor& positive, const Tensor& bank, const Tensor& inv_temperature,
    const Tensor& index, const OptionalTensor& bank_scale, const OptionalTensor& labels,
    const OptionalTensor& bank_labels, const OptionalTensor& exclude_index,
    const OptionalTensor& valid, const OptionalTensor& log_partition, std::int64_t num_noise,
    std::int64_t num_data, bool normalize) {
  const IndexedContrastArguments arguments = indexed_contrast_arguments(
      query, bank, inv_temperature, index, bank_scale, labels, bank_labels, exclude_index, valid,
      log_partition, num_noise, num_data, normalize);
  return contrast("indexed_contrast", positive, arguments.bank, normalize,
                  [&](const BankContrastOutputs& outputs, const void* positive_data) {
                    return indexed_contrast_cpu(outputs, positive_data, arguments.view,
                                                torch_executor());
                  });
}

Tensor indexed_contrast_backward(const Tensor& grad_loss, const Tensor& query, const Tensor& bank,
                                 const Tensor& inv_temperature, const Tensor& lse,
                                 const Tensor& index, const OptionalTensor& bank_scale,
                                 const OptionalTensor& labels, const OptionalTensor& bank_labels,
                                 const OptionalTensor& exclude_index, const OptionalTensor& valid,
                                 const OptionalTensor& log_partition, std::int64_t num_noise,
                                 std::int64_t num_data, bool normalize) {
  const IndexedContrastArguments arguments = indexed_contrast_arguments(
      query, bank, inv_temperature, index, bank_scale, labels, bank_labels, exclude_index, valid,
      log_partition, num_noise, num_data, normalize);
  return contrast_backward("indexed_contrast_backward", grad_loss, lse, bank, arguments.bank.view,
                           [&](void* dbank, const void* grad_data, const double* lse_data) {
                             return indexed_contrast_backward_cpu(dbank, grad_data, lse_data,
                                                                  arguments.view, torch_executor());
                           });
}

}  // namespace
}  // namespace codir_fast

STABLE_TORCH_LIBRARY_IMPL(codir_fast, CPU, m) {
  m.impl("bank_contrast", TORCH_BOX(&codir_fast::bank_contrast));
  m.impl("bank_contrast_backward", TORCH_BOX(&codir_fast::bank_contrast_backward));
  m.impl("indexed_contrast", TORCH_BOX(&codir_fast::indexed_contrast));
  m.impl("indexed_contrast_backward", TORCH_BOX(&codir_fast::indexed_contrast_backward));
}
