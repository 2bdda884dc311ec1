// The operators of codir_fast as PyTorch sees them: schemas, and the CPU implementations over the
// kernels of this folder, the contrastive ones in binding_contrast.cpp and binding_in_batch.cpp;
// binding_cuda.cpp has those for CUDA. LibTorch stable ABI only, so that one binary loads into
// every torch from 2.11 on. Python (codir_fast/ops) registers fake and autograd implementations and
// words the errors that users meet; checked here is what memory safety asks for, because operators
// can also be called directly.
#include "binding.h"

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "bank_update.h"
#include "executor.h"
#include "masked_pool.h"

namespace codir_fast {

Executor torch_executor() {
  return {
      static_cast<int>(torch::stable::get_num_threads()),
      [](std::int64_t size, const auto& body) { torch::stable::parallel_for(0, size, 1, body); }};
}

namespace {

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
      "in_batch_contrast(Tensor query, Tensor positive, Tensor inv_temperature, "
      "Tensor? labels=None, bool symmetric=False, bool normalize=False) -> "
      "(Tensor loss, Tensor lse)");
  m.def(
      "in_batch_contrast_backward(Tensor grad_loss, Tensor query, Tensor positive, "
      "Tensor inv_temperature, Tensor lse, Tensor? labels=None, "
      "bool symmetric=False, bool normalize=False) -> "
      "(Tensor dquery, Tensor dpositive, Tensor dinv_temperature)");
  m.def(
      "bank_update(Tensor(a!) bank, Tensor index, Tensor keys, float momentum, Tensor(b!)? "
      "filled=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(codir_fast, CPU, m) {
  m.impl("masked_pool", TORCH_BOX(&codir_fast::masked_pool));
  m.impl("masked_pool_backward", TORCH_BOX(&codir_fast::masked_pool_backward));
  m.impl("bank_update", TORCH_BOX(&codir_fast::bank_update));
}
