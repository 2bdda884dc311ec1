// The passes of bank_contrast_sm90 at one width, CODIR_FAST_SM90_DIM columns: this file is compiled
// once for each.
#include "sm90/bank_contrast_launch_pass.h"

namespace codir_fast {
namespace sm90 {
namespace {

constexpr int kDim = CODIR_FAST_SM90_DIM;

template <typename Config>
__global__ void __launch_bounds__(num_threads(Config::kTile), 1)
    bank_contrast_kernel(const __grid_constant__ TensorMap queries,
                         const __grid_constant__ TensorMap bank,
                         const __grid_constant__ PassArguments arguments) {
  extern __shared__ __align__(kSwizzleBytes) unsigned char shared_memory[];
  const auto base = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared_memory));
  if (base % kSwizzleBytes != 0) __trap();  // the swizzle would be another one
  bank_contrast_pass<Config>(queries, bank, arguments, base);
}

template <typename Config>
cudaError_t launch(const TensorMap& queries, const TensorMap& bank, const PassArguments& arguments,
                   int blocks, bool after_previous, cudaStream_t stream) {
  const auto kernel = bank_contrast_kernel<Config>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kLayout.bytes);
  if (error != cudaSuccess) return error;
  Launch launch(blocks, num_threads(Config::kTile), Config::kLayout.bytes, arguments.plan.cluster,
                after_previous, stream);
  return cudaLaunchKernelEx(&launch.config, kernel, queries, bank, arguments);
}

}  // namespace

template <>
cudaError_t launch_pass<kDim>(DType dtype, Weighing weighing, const TensorMap& queries,
                              const TensorMap& bank, const PassArguments& arguments, int blocks,
                              bool after_previous, cudaStream_t stream) {
  const auto run = [&](auto config) {
    return launch<decltype(config)>(queries, bank, arguments, blocks, after_previous, stream);
  };
  if (dtype == DType::kBFloat16) {
    if (weighing == Weighing::kFixedShift)
      return run(PassConfig<BFloat16Element, kDim, Weighing::kFixedShift>());
    if (weighing == Weighing::kNce) return run(PassConfig<BFloat16Element, kDim, Weighing::kNce>());
    return run(PassConfig<BFloat16Element, kDim, Weighing::kRunningMaximum>());
  }
  if (weighing == Weighing::kNce) return run(PassConfig<Float16Element, kDim, Weighing::kNce>());
  return run(PassConfig<Float16Element, kDim, Weighing::kRunningMaximum>());
}

}  // namespace sm90
}  // namespace codir_fast
