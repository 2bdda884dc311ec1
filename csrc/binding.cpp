// The operators of codir_fast as PyTorch sees them: schemas, and the CPU implementations over the
// kernels of this folder; binding_cuda.cpp has those for CUDA. LibTorch stable ABI only, so that
// one binary loads into every torch from 2.11 on. Python (codir_fast/ops) registers fake and
// autograd implementations and words the errors that users meet; checked here is what memory safety
// asks for, because operators can also be called directly.
#include "binding.h"

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "bank_contrast.h"
#include "bank_update.h"
#include "executor.h"
#include "indexed_contrast.h"
#include "masked_pool.h"
#include "unit_rows.h"

namespace codir_fast {

Executor torch_executor() {
  return {
      static_cast<int>(torch::stable::get_num_threads()),
      [](std::int64_t size, const auto& body) { torch::stable::parallel_for(0, size, 1, body); }};
}

namespace {

void check_status(Status status, const char* op) {
  STD_TORCH_CHECK(status != Status::kOutOfMemory, op,
                  ": out of memory for the kernel's scratch space");
  STD_TORCH_CHECK(status == Status::kOk, op, ": combination of dtypes is not supported");
}

struct RealTokenLists {
  std::vector<std::int64_t> offsets{0}, tokens;
  RealTokens view() const { return {offsets.data(), tokens.data()}; }
};

template <typename T>
void append_real_tokens(RealTokenLists& lists, const T* mask, std::int64_t B,
                        std::int64_t num_tokens) {
  for (std::int64_t b = 0; b < B; ++b) {
    for (std::int64_t t = 0; t < num_tokens; ++t) {
      if (mask == nullptr || mask[b * num_tokens + t] != 0) lists.tokens.push_back(t);
    }
    lists.offsets.push_back(static_cast<std::int64_t>(lists.tokens.size()));
  }
}

RealTokenLists real_tokens(const OptionalTensor& attention_mask, std::int64_t B,
                           std::int64_t num_tokens) {
  RealTokenLists lists;
  lists.tokens.reserve(B * num_tokens);
  if (!attention_mask) {
    append_real_tokens<bool>(lists, nullptr, B, num_tokens);
    return lists;
  }
  check_size(*attention_mask, "attention_mask", {B, num_tokens});
  const Tensor mask = dense(*attention_mask);
  if (mask.scalar_type() == ScalarType::Bool) {
    append_real_tokens(lists, mask.const_data_ptr<bool>(), B, num_tokens);
  } else {
    check_dtype(mask, "attention_mask", ScalarType::Long, "int64 or bool");
    append_real_tokens(lists, mask.const_data_ptr<std::int64_t>(), B, num_tokens);
  }
  return lists;
}

std::tuple<Tensor, Tensor> masked_pool(const std::vector<Tensor>& hidden_states,
                                       const OptionalTensor& attention_mask,
                                       const std::string& mode_name) {
  const PoolMode mode = pool_mode(mode_name);
  const LayersArgument layers = layers_argument(hidden_states);
  const RealTokenLists real = real_tokens(attention_mask, layers.B, layers.num_tokens);
  auto [pooled, argmax] = new_pooled(layers, mode);
  check_status(masked_pool_cpu(pooled.mutable_data_ptr(), argmax.mutable_data_ptr<std::int64_t>(),
                               layers.views.data(), real.view(), layers.L, layers.B, layers.H,
                               layers.dtype, mode, torch_executor()),
               "masked_pool");
  return {pooled, argmax};
}

std::vector<Tensor> masked_pool_backward(const Tensor& grad, const OptionalTensor& attention_mask,
                                         const Tensor& argmax, std::int64_t num_layers,
                                         std::int64_t num_tokens, const std::string& mode_name) {
  const PoolMode mode = pool_mode(mode_name);
  const PooledGradArgument given =
      pooled_grad_argument(grad, argmax, num_layers, num_tokens, mode, {});
  const std::int64_t* token = nullptr;
  if (mode == PoolMode::kMax) {
    token = given.argmax.const_data_ptr<std::int64_t>();
    for (std::int64_t n = 0; n < given.argmax.numel(); ++n) {
      STD_TORCH_CHECK(token[n] >= -1 && token[n] < num_tokens,
                      "`argmax` must be in [-1, num_tokens)");
    }
  }
  const RealTokenLists real = real_tokens(attention_mask, given.B, num_tokens);
  NewLayers dhidden(given.grad, num_layers, given.B, num_tokens, given.H);
  check_status(masked_pool_backward_cpu(dhidden.data.data(), given.grad.const_data_ptr(), token,
                                        real.view(), num_layers, given.B, num_tokens, given.H,
                                        given.dtype, mode, torch_executor()),
               "masked_pool_backward");
  return dhidden.tensors;
}

// Query or positive rows as a kernel takes them: dense, in the dtype of its arithmetic, of unit
// length if `normalize`.
struct PreparedRows {
  Tensor rows;
  std::vector<double> inverse_norm;  // empty unless normalised
};

DType compute_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// The torch dtype of compute_dtype.
std::int32_t torch_dtype(DType compute) {
  return compute == DType::kFloat64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

PreparedRows prepare_rows(const Tensor& given, const char* name, DType compute, bool normalize) {
  const DType dtype = dtype_of(given, name);
  if (!normalize && dtype == compute) return {dense(given), {}};
  const Tensor rows = dense(given);
  const std::int64_t N = rows.size(0), D = rows.size(1);
  PreparedRows out{new_tensor(torch_dtype(compute), {N, D}),
                   std::vector<double>(normalize ? N : 0)};
  check_status(
      unit_rows_cpu(out.rows.mutable_data_ptr(), normalize ? out.inverse_norm.data() : nullptr,
                    rows.const_data_ptr(), N, D, dtype, compute),
      name);
  return out;
}

// The gradient with respect to what was given, in place of the one with respect to `rows`.
void bring_back(const Tensor& gradient, const PreparedRows& rows, DType compute) {
  if (rows.inverse_norm.empty()) return;
  check_status(
      unit_rows_backward_cpu(gradient.mutable_data_ptr(), rows.rows.const_data_ptr(),
                             rows.inverse_norm.data(), gradient.size(0), gradient.size(1), compute),
      "gradient");
}

// Tensors made contiguous, kept alive while `view` points into them.
struct BankContrastArguments {
  PreparedRows query;
  Tensor bank, inv_temperature;
  OptionalTensor bank_scale, labels, bank_labels, exclude_index, valid;
  BankContrastInputs view;
};

double scalar_value(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == 1 && tensor.is_cpu(), "`", name,
                  "` must be a scalar tensor on the CPU");
  if (tensor.scalar_type() == ScalarType::Double) return *tensor.const_data_ptr<double>();
  check_dtype(tensor, name, ScalarType::Float, "float32 or float64");
  return *tensor.const_data_ptr<float>();
}

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

void bank_update(Tensor bank, const Tensor& index_view, const Tensor& keys_view, double momentum,
                 std::optional<Tensor> filled) {
  STD_TORCH_CHECK(bank.dim() == 2 && bank.is_cpu() && bank.is_contiguous(),
                  "`bank` must be a contiguous (K, D) tensor on the CPU");
  const DType dtype = dtype_of(bank, "bank");
  const std::int64_t K = bank.size(0), D = bank.size(1), N = index_view.numel();
  check_size(index_view, "index", {N});
  check_dtype(index_view, "index", ScalarType::Long, "int64");
  check_size(keys_view, "keys", {N, D});
  const bool is_double = dtype == DType::kFloat64;
  check_dtype(keys_view, "keys", is_double ? ScalarType::Double : ScalarType::Float,
              is_double ? "float64 for a float64 bank" : "float32");
  if (filled) {
    check_size(*filled, "filled", {K});
    check_dtype(*filled, "filled", ScalarType::Bool, "bool");
    STD_TORCH_CHECK(filled->is_contiguous(), "`filled` must be contiguous");
  }
  const Tensor index = dense(index_view), keys = dense(keys_view);
  const std::int64_t* row = index.const_data_ptr<std::int64_t>();
  for (std::int64_t n = 0; n < N; ++n) {
    STD_TORCH_CHECK(row[n] >= 0 && row[n] < K, "`index` must be in [0, ", K, "), got ", row[n]);
  }
  check_status(
      bank_update_cpu(bank.mutable_data_ptr(), filled ? filled->mutable_data_ptr<bool>() : nullptr,
                      row, keys.const_data_ptr(), N, D, dtype, momentum, torch_executor()),
      "bank_update");
}

}  // namespace
}  // namespace codir_fast

// What picks and scales the negatives, then the objective (NCE where log_partition is given), and
// what a contrastive operator gives.
#define NEGATIVES                                                                \
  "Tensor? bank_scale=None, Tensor? labels=None, Tensor? bank_labels=None, "     \
  "Tensor? exclude_index=None, Tensor? valid=None, Tensor? log_partition=None, " \
  "SymInt num_noise=1, SymInt num_data=1, bool normalize=False"
#define LOSS_AND_GRADIENTS \
  "(Tensor loss, Tensor lse, Tensor dquery, Tensor dpositive, Tensor dinv_temperature)"

STABLE_TORCH_LIBRARY(codir_fast, m) {
  m.def(
      "masked_pool(Tensor[] hidden_states, Tensor? attention_mask, str mode) -> (Tensor pooled, "
      "Tensor argmax)");
  m.def(
      "masked_pool_backward(Tensor grad, Tensor? attention_mask, Tensor argmax, int num_layers, "
      "SymInt num_tokens, "
      "str mode) -> Tensor[]");
  m.def(
      "bank_contrast(Tensor query, Tensor positive, Tensor bank, Tensor inv_temperature, " NEGATIVES
      ") -> " LOSS_AND_GRADIENTS);
  m.def(
      "bank_contrast_backward(Tensor grad_loss, Tensor query, Tensor bank, Tensor inv_temperature, "
      "Tensor lse, " NEGATIVES ") -> Tensor");
  m.def(
      "indexed_contrast(Tensor query, Tensor positive, Tensor bank, Tensor inv_temperature, "
      "Tensor index, " NEGATIVES ") -> " LOSS_AND_GRADIENTS);
  m.def(
      "indexed_contrast_backward(Tensor grad_loss, Tensor query, Tensor bank, "
      "Tensor inv_temperature, Tensor lse, Tensor index, " NEGATIVES ") -> Tensor");
  m.def(
      "bank_update(Tensor(a!) bank, Tensor index, Tensor keys, float momentum, Tensor(b!)? "
      "filled=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(codir_fast, CPU, m) {
  m.impl("masked_pool", TORCH_BOX(&codir_fast::masked_pool));
  m.impl("masked_pool_backward", TORCH_BOX(&codir_fast::masked_pool_backward));
  m.impl("bank_contrast", TORCH_BOX(&codir_fast::bank_contrast));
  m.impl("bank_contrast_backward", TORCH_BOX(&codir_fast::bank_contrast_backward));
  m.impl("indexed_contrast", TORCH_BOX(&codir_fast::indexed_contrast));
  m.impl("indexed_contrast_backward", TORCH_BOX(&codir_fast::indexed_contrast_backward));
  m.impl("bank_update", TORCH_BOX(&codir_fast::bank_update));
}
