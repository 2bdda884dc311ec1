// The operators that have hand-written CUDA kernels, as PyTorch sees them on CUDA tensors. Built
// where nvcc is, against a torch that need not have CUDA: nothing of torch's CUDA part is linked.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "bank_contrast_sm90.h"
#include "binding.h"
#include "masked_pool_cuda.h"

namespace codir_fast {
namespace {

// PyTorch's current stream on a device, from the library that made the tensors.
void* current_stream(std::int32_t device) {
  using Get = AOTITorchError (*)(std::int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr
               ? nullptr
               : reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get != nullptr, "this torch has no CUDA: libtorch_cuda.so is not loaded");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

void check_launch(const char* error, const char* op) {
  STD_TORCH_CHECK(error == nullptr, op, ": ", error == nullptr ? "" : error);
}

// A 0-d float32 or float64 tensor on the CPU, or on the GPU at `place`, where the kernel reads it.
sm90::Scalar scalar_argument(const Tensor& tensor, const char* name, const Place& place) {
  STD_TORCH_CHECK(tensor.numel() == 1, "`", name, "` must be a scalar tensor");
  const bool is_double = tensor.scalar_type() == ScalarType::Double;
  if (!is_double) check_dtype(tensor, name, ScalarType::Float, "float32 or float64");
  if (place_of(tensor) == place) return {0, tensor.const_data_ptr(), is_double};
  STD_TORCH_CHECK(tensor.is_cpu(), "`", name, "` must be on the CPU or the query's GPU");
  const double value = is_double ? *tensor.const_data_ptr<double>()
                                 : static_cast<double>(*tensor.const_data_ptr<float>());
  return {value, nullptr, true};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bank_contrast(
    const Tensor& query_view, const Tensor& positive_view, const Tensor& bank_view,
    const Tensor& inv_temperature, const OptionalTensor& bank_scale,
    const OptionalTensor& labels_view, const OptionalTensor& bank_labels_view,
    const OptionalTensor& exclude_index_view, const OptionalTensor& valid_view,
    const OptionalTensor& log_partition, std::int64_t num_noise, std::int64_t num_data,
    bool normalize) {
  STD_TORCH_CHECK(query_view.dim() == 2, "`query` must be a (B, D) tensor");
  STD_TORCH_CHECK(bank_view.dim() == 2, "`bank` must be a (K, D) tensor");
  STD_TORCH_CHECK(!bank_scale, "backend 'cuda' takes no `bank_scale`: the bank's rows as they are");
  STD_TORCH_CHECK(labels_view.has_value() == bank_labels_view.has_value(),
                  "`labels` and `bank_labels` go together");
  STD_TORCH_CHECK(num_noise > 0 && num_data > 0,
                  "`num_noise` and `num_data` must be positive, got ", num_noise, " and ",
                  num_data);
  const std::int64_t B = query_view.size(0), K = bank_view.size(0), D = query_view.size(1);
  const Place place = place_of(query_view);
  check_size(bank_view, "bank", {K, D}, place);
  check_size(positive_view, "positive", {B, D}, place);
  STD_TORCH_CHECK(bank_view.scalar_type() == query_view.scalar_type(),
                  "backend 'cuda' needs a `bank` of the dtype of `query`");
  const Tensor query = dense(query_view), bank = dense(bank_view);
  const bool positive_is_float = positive_view.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(positive_is_float || positive_view.scalar_type() == query.scalar_type(),
                  "backend 'cuda' needs a `positive` of the dtype of `query`, or float32");
  const Tensor positive = dense(positive_view);
  const auto vector = [&](const OptionalTensor& tensor, const char* name, std::int64_t size) {
    return vector_argument(tensor, name, size, ScalarType::Long, "int64", place);
  };
  const OptionalTensor labels = vector(labels_view, "labels", B);
  const OptionalTensor bank_labels = vector(bank_labels_view, "bank_labels", K);
  const OptionalTensor exclude_index = vector(exclude_index_view, "exclude_index", B);
  const OptionalTensor valid =
      vector_argument(valid_view, "valid", K, ScalarType::Bool, "bool", place);

  BankContrastSm90 in{};
  in.query = query.const_data_ptr(), in.bank = bank.const_data_ptr();
  in.positive = positive.const_data_ptr(), in.positive_is_float = positive_is_float;
  in.labels = data_or_null<std::int64_t>(labels);
  in.bank_labels = data_or_null<std::int64_t>(bank_labels);
  in.exclude_index = data_or_null<std::int64_t>(exclude_index);
  in.valid = data_or_null<bool>(valid);
  in.B = B, in.K = K, in.D = D, in.dtype = dtype_of(query, "query");
  in.inv_temperature = scalar_argument(inv_temperature, "inv_temperature", place);
  in.objective = log_partition ? Objective::kNce : Objective::kInfoNce;
  if (log_partition) in.log_partition = scalar_argument(*log_partition, "log_partition", place);
  in.noise_ratio = static_cast<double>(num_noise) / static_cast<double>(num_data);
  in.normalize = normalize;
  const char* reason = why_not_bank_contrast_sm90(in);
  STD_TORCH_CHECK(reason == nullptr,
                  "backend 'cuda' can't take these inputs: ", reason == nullptr ? "" : reason);

  const torch::stable::accelerator::DeviceGuard guard(place.index);
  const std::int32_t float32 = aoti_torch_dtype_float32();
  Tensor loss = new_tensor(float32, {B}, place);
  Tensor lse = new_tensor(aoti_torch_dtype_float64(), {B}, place);
  Tensor dquery = new_tensor(float32, {B, D}, place),
         dpositive = new_tensor(float32, {B, D}, place);
  Tensor dinv_temperature = new_tensor(float32, {B}, place);
  std::size_t bytes = 0;
  check_launch(bank_contrast_sm90_workspace(in, place.index, &bytes), "bank_contrast");
  Tensor workspace =
      new_tensor(aoti_torch_dtype_uint8(), {static_cast<std::int64_t>(bytes)}, place);
  const BankContrastOutputs outputs{loss.mutable_data_ptr(), lse.mutable_data_ptr<double>(),
                                    dquery.mutable_data_ptr(), dpositive.mutable_data_ptr(),
                                    dinv_temperature.mutable_data_ptr()};
  check_launch(bank_contrast_sm90(outputs, in, workspace.mutable_data_ptr(), place.index,
                                  current_stream(place.index)),
               "bank_contrast");
  return {loss, lse, dquery, dpositive, dinv_temperature};
}

// The mask as the kernels read it, at any strides.
TokenMask token_mask(const OptionalTensor& mask, std::int64_t B, std::int64_t T,
                     const Place& place) {
  if (!mask) return {nullptr, true, 0, 0};
  check_size(*mask, "attention_mask", {B, T}, place);
  const bool is_byte = mask->scalar_type() == ScalarType::Bool;
  if (!is_byte) check_dtype(*mask, "attention_mask", ScalarType::Long, "int64 or bool");
  return {mask->const_data_ptr(), is_byte, mask->stride(0), mask->stride(1)};
}

std::tuple<Tensor, Tensor> masked_pool(const std::vector<Tensor>& hidden_states,
                                       const OptionalTensor& attention_mask,
                                       const std::string& mode_name) {
  const PoolMode mode = pool_mode(mode_name);
  const LayersArgument layers = layers_argument(hidden_states);
  const TokenMask mask = token_mask(attention_mask, layers.B, layers.num_tokens, layers.place);
  const torch::stable::accelerator::DeviceGuard guard(layers.place.index);
  auto [pooled, argmax] = new_pooled(layers, mode);
  check_launch(masked_pool_cuda(pooled.mutable_data_ptr(), argmax.mutable_data_ptr<std::int64_t>(),
                                layers.views.data(), mask, layers.L, layers.B, layers.num_tokens,
                                layers.H, layers.dtype, mode, current_stream(layers.place.index)),
               "masked_pool");
  return {pooled, argmax};
}

// A token of `argmax` that is none chooses none: nothing is looked at on the host.
std::vector<Tensor> masked_pool_backward(const Tensor& grad, const OptionalTensor& attention_mask,
                                         const Tensor& argmax, std::int64_t num_layers,
                                         std::int64_t num_tokens, const std::string& mode_name) {
  const PoolMode mode = pool_mode(mode_name);
  const Place place = place_of(grad);
  const PooledGradArgument given =
      pooled_grad_argument(grad, argmax, num_layers, num_tokens, mode, place);
  const TokenMask mask = token_mask(attention_mask, given.B, num_tokens, place);
  const torch::stable::accelerator::DeviceGuard guard(place.index);
  NewLayers dhidden(given.grad, num_layers, given.B, num_tokens, given.H);
  check_launch(
      masked_pool_backward_cuda(
          dhidden.data.data(), given.grad.const_data_ptr(),
          mode == PoolMode::kMax ? given.argmax.const_data_ptr<std::int64_t>() : nullptr, mask,
          num_layers, given.B, num_tokens, given.H, given.dtype, mode, current_stream(place.index)),
      "masked_pool_backward");
  return dhidden.tensors;
}

}  // namespace
}  // namespace codir_fast

STABLE_TORCH_LIBRARY_IMPL(codir_fast, CUDA, m) {
  m.impl("bank_contrast", TORCH_BOX(&codir_fast::bank_contrast));
  m.impl("masked_pool", TORCH_BOX(&codir_fast::masked_pool));
  m.impl("masked_pool_backward", TORCH_BOX(&codir_fast::masked_pool_backward));
}
