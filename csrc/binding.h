// What the operators' bindings share, on the CPU and on CUDA: checks that memory safety asks for,
// and new tensors. LibTorch stable ABI only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common.h"
#include "masked_pool.h"

namespace codir_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void check_status(Status status, const char* op) {
  STD_TORCH_CHECK(status != Status::kOutOfMemory, op,
                  ": out of memory for the kernel's scratch space");
  STD_TORCH_CHECK(status == Status::kOk, op, ": combination of dtypes is not supported");
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "`", name, "` must be float32, float64, bfloat16 or float16");
  }
}

// Where a tensor lies.
struct Place {
  std::int32_t type = aoti_torch_device_type_cpu();
  std::int32_t index = -1;  // the CPU has none

  bool operator==(const Place& other) const { return type == other.type && index == other.index; }
};

inline Place place_of(const Tensor& tensor) {
  Place place;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &place.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &place.index));
  return place;
}

// A shape, and the device: the CPU unless one is named.
inline void check_size(const Tensor& tensor, const char* name,
                       std::initializer_list<std::int64_t> size, const Place& place = {}) {
  bool same = tensor.dim() == static_cast<std::int64_t>(size.size());
  for (std::size_t n = 0; same && n < size.size(); ++n) {
    same = tensor.size(static_cast<std::int64_t>(n)) == size.begin()[n];
  }
  if (!same) {
    std::string expected, got;
    for (const std::int64_t n : size) expected += std::to_string(n) + ", ";
    for (std::int64_t n = 0; n < tensor.dim(); ++n) got += std::to_string(tensor.size(n)) + ", ";
    STD_TORCH_CHECK(false, "`", name, "` must have shape (", expected, "), got (", got, ")");
  }
  STD_TORCH_CHECK(place_of(tensor) == place, "`", name, "` must be on ",
                  place.type == aoti_torch_device_type_cpu() ? "the CPU" : "the query's GPU");
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType dtype,
                        const char* dtype_name) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "`", name, "` must be ", dtype_name);
}

// Uninitialised, on the CPU unless a device is named. Not through the dispatcher: small losses make
// five of them per call.
inline Tensor new_tensor(std::int32_t dtype, std::initializer_list<std::int64_t> size,
                         const Place& place = {}) {
  constexpr std::size_t kMaxDims = 4;
  std::int64_t strides[kMaxDims], stride = 1;
  for (std::size_t n = size.size(); n-- > 0;) {
    strides[n] = stride;
    stride *= std::max<std::int64_t>(size.begin()[n], 1);
  }
  AtenTensorHandle tensor;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(size.size()),
                                                  size.begin(), strides, dtype, place.type,
                                                  place.index, &tensor));
  return Tensor(tensor);
}

// In the dtype of `like`, and where it lies.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<std::int64_t> size) {
  std::int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return new_tensor(dtype, size, place_of(like));
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline PoolMode pool_mode(const std::string& name) {
  if (name == "mean") return PoolMode::kMean;
  if (name == "first") return PoolMode::kFirst;
  if (name == "last") return PoolMode::kLast;
  STD_TORCH_CHECK(name == "max", "`mode` must be mean, first, last or max, got ", name);
  return PoolMode::kMax;
}

inline OptionalTensor vector_argument(const OptionalTensor& tensor, const char* name,
                                      std::int64_t size, ScalarType dtype, const char* dtype_name,
                                      const Place& place = {}) {
  if (!tensor) return std::nullopt;
  check_size(*tensor, name, {size}, place);
  check_dtype(*tensor, name, dtype, dtype_name);
  return dense(*tensor);
}

template <typename Element>
const Element* data_or_null(const OptionalTensor& tensor) {
  return tensor ? static_cast<const Element*>(tensor->const_data_ptr()) : nullptr;
}

// Hidden states as the kernels of masked_pool take them; `owners` keeps copies made here alive.
struct LayersArgument {
  std::vector<Tensor> owners;
  std::vector<HiddenState> views;
  std::int64_t L, B, num_tokens, H;
  DType dtype;
  Place place;
};

inline LayersArgument layers_argument(const std::vector<Tensor>& hidden_states) {
  STD_TORCH_CHECK(!hidden_states.empty(), "`hidden_states` must hold at least one tensor");
  const Tensor& first = hidden_states[0];
  STD_TORCH_CHECK(first.dim() == 3, "`hidden_states` must hold tensors of shape (B, T, H)");
  LayersArgument layers{{},
                        {},
                        static_cast<std::int64_t>(hidden_states.size()),
                        first.size(0),
                        first.size(1),
                        first.size(2),
                        dtype_of(first, "hidden_states"),
                        place_of(first)};
  for (const Tensor& layer : hidden_states) {
    check_size(layer, "hidden_states", {layers.B, layers.num_tokens, layers.H}, layers.place);
    STD_TORCH_CHECK(layer.scalar_type() == first.scalar_type(),
                    "`hidden_states` must share one dtype");
    const Tensor& owner = layers.owners.emplace_back(layer.stride(2) == 1 ? layer : dense(layer));
    layers.views.push_back({owner.const_data_ptr(), owner.stride(0), owner.stride(1)});
  }
  return layers;
}

// pooled (B, L*H) and argmax, (B, L*H) or (0,), of masked_pool; uninitialised.
inline std::tuple<Tensor, Tensor> new_pooled(const LayersArgument& layers, PoolMode mode) {
  const std::int64_t width = layers.L * layers.H;
  const std::int32_t int64 = aoti_torch_dtype_int64();
  return {new_tensor(layers.owners[0], {layers.B, width}),
          mode == PoolMode::kMax ? new_tensor(int64, {layers.B, width}, layers.place)
                                 : new_tensor(int64, {std::int64_t{0}}, layers.place)};
}

// The gradient of `pooled`, dense, and argmax likewise where there is one; H is found from them.
struct PooledGradArgument {
  Tensor grad, argmax;
  std::int64_t B, H;
  DType dtype;
  Place place;
};

inline PooledGradArgument pooled_grad_argument(const Tensor& grad, const Tensor& argmax,
                                               std::int64_t num_layers, std::int64_t num_tokens,
                                               PoolMode mode, const Place& place) {
  STD_TORCH_CHECK(num_layers > 0 && num_tokens >= 0,
                  "`num_layers` must be positive, `num_tokens` not negative");
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(1) % num_layers == 0,
                  "`grad` must have shape (B, num_layers * H)");
  const std::int64_t B = grad.size(0), H = grad.size(1) / num_layers;
  check_size(grad, "grad", {B, num_layers * H}, place);
  PooledGradArgument pooled{dense(grad), argmax, B, H, dtype_of(grad, "grad"), place};
  if (mode == PoolMode::kMax) {
    check_size(argmax, "argmax", {B, num_layers * H}, place);
    check_dtype(argmax, "argmax", ScalarType::Long, "int64");
    pooled.argmax = dense(argmax);
  }
  return pooled;
}

// A tensor (B, T, H) for each layer, to be written, and where they lie: allocators are slow at very
// large ones, which they hand back to the system each time.
struct NewLayers {
  std::vector<Tensor> tensors;
  std::vector<void*> data;

  NewLayers(const Tensor& like, std::int64_t num_layers, std::int64_t B, std::int64_t num_tokens,
            std::int64_t H) {
    for (std::int64_t l = 0; l < num_layers; ++l) {
      tensors.push_back(new_tensor(like, {B, num_tokens, H}));
      data.push_back(tensors.back().mutable_data_ptr());
    }
  }
};

}  // namespace
}  // namespace codir_fast
