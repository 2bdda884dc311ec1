// in_batch_contrast on the CPU as PyTorch sees it; schemas are in binding.cpp.
#include <cstdint>
#include <tuple>

#include "binding_rows.h"
#include "executor.h"
#include "in_batch_contrast.h"

namespace codir_fast {
namespace {

// What both operators of in_batch_contrast take.
struct InBatchContrastArguments {
  PreparedRows query, positive;
  OptionalTensor labels;
  InBatchContrastInputs view;

  InBatchContrastArguments(const Tensor& given_query, const Tensor& given_positive,
                           const Tensor& inv_temperature, const OptionalTensor& given_labels,
                           bool symmetric, bool normalize) {
    STD_TORCH_CHECK(given_query.dim() == 2 && given_query.is_cpu(),
                    "`query` must be a (B, D) tensor on the CPU");
    const std::int64_t B = given_query.size(0), D = given_query.size(1);
    STD_TORCH_CHECK(D > 0, "`query` must have at least one column");
    check_size(given_positive, "positive", {B, D});
    const DType compute = compute_dtype(dtype_of(given_query, "query"));
    query = prepare_rows(given_query, "query", compute, normalize);
    positive = prepare_rows(given_positive, "positive", compute, normalize);
    labels = vector_argument(given_labels, "labels", B, ScalarType::Long, "int64");
    view = {query.rows.const_data_ptr(),
            positive.rows.const_data_ptr(),
            data_or_null<std::int64_t>(labels),
            B,
            D,
            compute,
            scalar_value(inv_temperature, "inv_temperature"),
            symmetric};
  }

  std::int64_t directions() const { return view.symmetric ? 2 : 1; }
};

std::tuple<Tensor, Tensor> in_batch_contrast(const Tensor& query, const Tensor& positive,
                                             const Tensor& inv_temperature,
                                             const OptionalTensor& labels, bool symmetric,
                                             bool normalize) {
  const InBatchContrastArguments arguments(query, positive, inv_temperature, labels, symmetric,
                                           normalize);
  const std::int64_t B = arguments.view.B;
  Tensor loss = new_tensor(torch_dtype(arguments.view.dtype), {B});
  Tensor lse = new_tensor(aoti_torch_dtype_float64(), {arguments.directions(), B});
  check_status(in_batch_contrast_cpu(loss.mutable_data_ptr(), lse.mutable_data_ptr<double>(),
                                     arguments.view, torch_executor()),
               "in_batch_contrast");
  return {loss, lse};
}

std::tuple<Tensor, Tensor, Tensor> in_batch_contrast_backward(
    const Tensor& grad_loss_view, const Tensor& query, const Tensor& positive,
    const Tensor& inv_temperature, const Tensor& lse_view, const OptionalTensor& labels,
    bool symmetric, bool normalize) {
  const InBatchContrastArguments arguments(query, positive, inv_temperature, labels, symmetric,
                                           normalize);
  const std::int64_t B = arguments.view.B, D = arguments.view.D;
  const DType compute = arguments.view.dtype;
  const std::int32_t dtype = torch_dtype(compute);
  const bool is_double = compute == DType::kFloat64;
  const Tensor grad_loss = *vector_argument(grad_loss_view, "grad_loss", B,
                                            is_double ? ScalarType::Double : ScalarType::Float,
                                            is_double ? "float64, as `query`" : "float32");
  check_size(lse_view, "lse", {arguments.directions(), B});
  check_dtype(lse_view, "lse", ScalarType::Double, "float64");
  const Tensor lse = dense(lse_view);
  Tensor dquery = new_tensor(dtype, {B, D}), dpositive = new_tensor(dtype, {B, D});
  Tensor dinv_temperature = new_tensor(dtype, {});
  check_status(
      in_batch_contrast_backward_cpu({dquery.mutable_data_ptr(), dpositive.mutable_data_ptr(),
                                      dinv_temperature.mutable_data_ptr()},
                                     grad_loss.const_data_ptr(), lse.const_data_ptr<double>(),
                                     arguments.view, torch_executor()),
      "in_batch_contrast_backward");
  bring_back(dquery, arguments.query, compute);
  bring_back(dpositive, arguments.positive, compute);
  return {dquery, dpositive, dinv_temperature};
}

}  // namespace
}  // namespace codir_fast

STABLE_TORCH_LIBRARY_IMPL(codir_fast, CPU, m) {
  m.impl("in_batch_contrast", TORCH_BOX(&codir_fast::in_batch_contrast));
  m.impl("in_batch_contrast_backward", TORCH_BOX(&codir_fast::in_batch_contrast_backward));
}
