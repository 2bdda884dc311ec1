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

#include "common.h"
#include "masked_pool.h"

namespace codir_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

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
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &place.type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &place.index));
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
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(size.size()),
                                                         size.begin(), strides, dtype, place.type,
                                                         place.index, &tensor));
  return Tensor(tensor);
}

// In the dtype of `like`, and where it lies.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<std::int64_t> size) {
  std::int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
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

}  // namespace
}  // namespace codir_fast
