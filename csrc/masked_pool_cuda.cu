// Launches of masked_pool_cuda.
#include <cuda_runtime.h>

#include <algorithm>

#include "masked_pool_cuda.h"
#include "masked_pool_cuda_impl.h"

namespace codir_fast {
namespace pool {
namespace {

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    masked_pool_kernel(const __grid_constant__ PoolArguments arguments, PoolMode mode) {
  __shared__ __align__(16) unsigned char exchange[exchange_bytes<T, kVector>()];
  pool_forward<T, kVector>(arguments, mode, exchange);
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, 8)
    masked_pool_backward_kernel(const __grid_constant__ PoolArguments arguments, PoolMode mode) {
  __shared__ __align__(16) unsigned char exchange[kWarps * sizeof(int)];
  pool_backward<T, kVector>(arguments, mode, exchange);
}

template <typename T, int kVector>
cudaError_t launch(const PoolArguments& a, int layers, PoolMode mode, bool backward,
                   cudaStream_t stream) {
  const std::int64_t chunks = (a.H + kLanes * kVector - 1) / (kLanes * kVector);
  const std::int64_t blocks = std::int64_t{layers} * a.B * chunks;
  if (blocks >= std::int64_t{1} << 31) return cudaErrorInvalidConfiguration;
  const auto kernel =
      backward ? masked_pool_backward_kernel<T, kVector> : masked_pool_kernel<T, kVector>;
  if (!backward) {  // room for kResidentBlocks
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(a, mode);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const PoolArguments& a, int layers, PoolMode mode, bool backward,
                   cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  return vector_size<T>(a, backward) == 1 ? launch<T, 1>(a, layers, mode, backward, stream)
                                          : launch<T, kVector>(a, layers, mode, backward, stream);
}

cudaError_t launch(const PoolArguments& a, int layers, DType dtype, PoolMode mode, bool backward,
                   cudaStream_t stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch<float>(a, layers, mode, backward, stream);
    case DType::kFloat64:
      return launch<double>(a, layers, mode, backward, stream);
    case DType::kBFloat16:
      return launch<__nv_bfloat16>(a, layers, mode, backward, stream);
    case DType::kFloat16:
      return launch<__half>(a, layers, mode, backward, stream);
  }
  return cudaErrorInvalidValue;
}

// Launches for every kMaxPoolLayers layers; set_layers(arguments, first, count) names theirs.
template <typename SetLayers>
const char* for_layers(PoolArguments& a, DType dtype, PoolMode mode, bool backward, void* stream,
                       const SetLayers& set_layers) {
  if (a.B == 0 || a.H == 0 || (backward && a.T == 0)) return nullptr;
  for (a.first_layer = 0; a.first_layer < a.L; a.first_layer += kMaxPoolLayers) {
    const int count = std::min(kMaxPoolLayers, a.L - a.first_layer);
    set_layers(a.first_layer, count);
    const cudaError_t error =
        launch(a, count, dtype, mode, backward, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  return nullptr;
}

}  // namespace
}  // namespace pool

const char* masked_pool_cuda(void* pooled, std::int64_t* argmax, const HiddenState* hidden_states,
                             TokenMask mask, std::int64_t L, std::int64_t B, std::int64_t T,
                             std::int64_t H, DType dtype, PoolMode mode, void* stream) {
  pool::PoolArguments a{};
  a.pooled = pooled, a.argmax = argmax, a.mask = mask;
  a.L = static_cast<int>(L), a.B = static_cast<int>(B);
  a.T = static_cast<int>(T), a.H = static_cast<int>(H);
  return pool::for_layers(a, dtype, mode, false, stream, [&](int first, int count) {
    std::copy(hidden_states + first, hidden_states + first + count, a.layers);
  });
}

const char* masked_pool_backward_cuda(void* const* dhidden, const void* grad,
                                      const std::int64_t* argmax, TokenMask mask, std::int64_t L,
                                      std::int64_t B, std::int64_t T, std::int64_t H, DType dtype,
                                      PoolMode mode, void* stream) {
  pool::PoolArguments a{};
  a.pooled = const_cast<void*>(grad), a.argmax = const_cast<std::int64_t*>(argmax), a.mask = mask;
  a.L = static_cast<int>(L), a.B = static_cast<int>(B);
  a.T = static_cast<int>(T), a.H = static_cast<int>(H);
  return pool::for_layers(a, dtype, mode, true, stream, [&](int first, int count) {
    std::copy(dhidden + first, dhidden + first + count, a.dhidden);
  });
}

}  // namespace codir_fast
